// The matrix instructions of compute capability 9.0: D[64, n] += A[64, 32 bytes of K] * B[n, 32 bytes of K]^T
// by a warpgroup, asynchronously. PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate
// Operation".
//
// The overloads of wgmma choose n by the sums that a thread holds, n / 2 of them: sums[4j + 2h + i] is row
// 16 * (warp mod 4) + 8h + lane / 4, column 8j + 2 * (lane mod 4) + i.
#pragma once

#include <cstdint>

namespace dtm_fast {
namespace hopper {

constexpr int kWgmmaBytes = 32;                    // of K, in one instruction
constexpr int kDescriptorStep = kWgmmaBytes / 16;  // to the next 32 bytes of K: addresses count 16 bytes

// A tile in shared memory: rows of 128 bytes of K, the 16-byte chunks of row r permuted as chunk ^ (r mod 8),
// from an address that is a multiple of 1024. PTX ISA, "Matrix Descriptor Format".
__device__ inline uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kNextEightRows = uint64_t{1024 / 16} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;  // the offset along K, which a swizzled row does not have
  return kSwizzle128 | kNextEightRows | kUnused | ((address >> 4) & 0x3fff);
}

// Before the first wgmma after other instructions wrote its registers.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving a use of these registers before a wait, which for it has nothing to do with
// them.
template <int kCount>
__device__ __forceinline__ void hold(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void hold(int32_t (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void hold(uint32_t (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// clang-format off
#define DTM_OUT8(kind, d, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3]), \
                             kind(d[i + 4]), kind(d[i + 5]), kind(d[i + 6]), kind(d[i + 7])
#define DTM_OUT32(kind, d, i) DTM_OUT8(kind, d, i), DTM_OUT8(kind, d, i + 8), DTM_OUT8(kind, d, i + 16), DTM_OUT8(kind, d, i + 24)
#define DTM_OUT64(kind, d) DTM_OUT32(kind, d, 0), DTM_OUT32(kind, d, 32)
#define DTM_OUT128(kind, d) DTM_OUT64(kind, d), DTM_OUT32(kind, d, 64), DTM_OUT32(kind, d, 96)
#define DTM_NAMES32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DTM_NAMES64 DTM_NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DTM_NAMES128 DTM_NAMES64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// The operands after the sums; sums are overwritten where accumulate is 0.
#define DTM_WGMMA(flag, shape, names, operands, tail)                                          \
  "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " flag ", 0;\n"                                  \
  "wgmma.mma_async.sync.aligned." shape " {" names "}, " operands ", accumulate" tail ";\n}"
// clang-format on

// int8, exact in int32; A and B in shared memory.
__device__ __forceinline__ void wgmma(int32_t (&sums)[128], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(DTM_WGMMA("%130", "m64n256k32.s32.s8.s8", DTM_NAMES128, "%128, %129", "")
               : DTM_OUT128("+r", sums)
               : "l"(a), "l"(b), "r"(accumulate));
}
__device__ __forceinline__ void wgmma(int32_t (&sums)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(DTM_WGMMA("%66", "m64n128k32.s32.s8.s8", DTM_NAMES64, "%64, %65", "")
               : DTM_OUT64("+r", sums)
               : "l"(a), "l"(b), "r"(accumulate));
}

// bfloat16, sums in float32; A and B in shared memory.
__device__ __forceinline__ void wgmma(float (&sums)[128], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(DTM_WGMMA("%130", "m64n256k16.f32.bf16.bf16", DTM_NAMES128, "%128, %129", ", 1, 1, 0, 0")
               : DTM_OUT128("+f", sums)
               : "l"(a), "l"(b), "r"(accumulate));
}

// bfloat16, A in registers, two entries along K in each: a[2i + h] is row 8h + lane / 4 of the warp's 16,
// entries 8i + 2 * (lane mod 4) and the next. They must not change until the products are done.
__device__ __forceinline__ void wgmma(float (&sums)[128], const uint32_t (&a)[4], uint64_t b,
                                      int accumulate) {
  asm volatile(DTM_WGMMA("%133", "m64n256k16.f32.bf16.bf16", DTM_NAMES128, "{%128, %129, %130, %131}, %132",
                         ", 1, 1, 0")
               : DTM_OUT128("+f", sums)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
__device__ __forceinline__ void wgmma(float (&sums)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      DTM_WGMMA("%69", "m64n128k16.f32.bf16.bf16", DTM_NAMES64, "{%64, %65, %66, %67}, %68", ", 1, 1, 0")
      : DTM_OUT64("+f", sums)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
__device__ __forceinline__ void wgmma(float (&sums)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      DTM_WGMMA("%37", "m64n64k16.f32.bf16.bf16", DTM_NAMES32, "{%32, %33, %34, %35}, %36", ", 1, 1, 0")
      : DTM_OUT32("+f", sums, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef DTM_OUT8
#undef DTM_OUT32
#undef DTM_OUT64
#undef DTM_OUT128
#undef DTM_NAMES32
#undef DTM_NAMES64
#undef DTM_NAMES128
#undef DTM_WGMMA

}  // namespace hopper
}  // namespace dtm_fast
