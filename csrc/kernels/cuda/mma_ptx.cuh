// The instructions of Ampere that CUDA C++ has no name for (PTX ISA, "Warp-level matrix instructions" and
// "Data movement"). Nothing but them, so that the tiles around them can be run on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dtm_fast {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, past the first-level cache: the first `bytes` are copied, the others become 0.
// Rows are read in pieces of 64 bytes, hence the hint to bring the other half of a line into the second-level
// cache.
__device__ inline void copy_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

__device__ inline void copy_async_4(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of the groups that this thread committed are under way.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 16 byte matrices; lane l gives the address of row l % 8 of matrix l / 8, and gets of every matrix
// the 4 bytes at 4 * (l % 4) of row l / 4.
__device__ inline void load_matrices(uint32_t (&matrices)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// sums += a * b for 16 rows of a and 8 columns of b. bfloat16: over 16 elements; int8: over 32. In bytes the
// fragments of both are laid out alike.
__device__ inline void multiply_fragments(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_fragments(int32_t (&sums)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Byte i of the result: of the eight bytes of low and high the one that bits 0 to 2 of nibble i of the
// selector name; where bit 3 is set, its highest bit eight times, which __byte_perm does not promise.
__device__ inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

// Until the kernels that this one was launched behind have finished and their writes are visible.
__device__ inline void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Two floats as bfloat16, the first in the lower half: to nearest, ties to even; every NaN becomes 0x7fc0, as
// on the CPU.
__device__ inline uint32_t bfloat16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  if (low != low) pair = (pair & 0xffff0000u) | 0x7fc0u;
  if (high != high) pair = (pair & 0xffffu) | 0x7fc00000u;
  return pair;
}

}  // namespace dtm_fast
