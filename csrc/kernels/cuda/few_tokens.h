// Device code that the kernels for few tokens share: streaming loads, mma.sync, rounding, programmatic
// launches.
//
// All of them give 16 rows of the weight to the first operand of mma.sync and 8 tokens to the second. A
// product over k does not care which k a lane calls its own as long as both operands agree: so every lane
// takes 16 neighbouring bytes of a row, instead of the scattered pairs and fours of the fragments in the PTX
// manual ("Matrix Fragments for mma.m16n8k16 / m16n8k32"), and no data goes through shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace dtm_fast {
namespace few_tokens {

constexpr int kMostTokens = 16;
constexpr int kTokenTile = 8;  // tokens of one mma
constexpr int kRowTile = 16;   // rows of the weight of one mma

// Weights are read once: they must not push out of L1 what is read again. volatile, for the loads to stay
// where they are written, ahead of their use. Not ld.global.nc, which ptxas moves behind wait_for_grid.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// The first `left` of 16 / sizeof(T) elements, the rest 0; nothing behind them is read.
template <typename T>
__device__ __forceinline__ uint4 load_some(const T* from, int64_t left) {
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) {
    constexpr int kPerWord = 4 / sizeof(T);
    if (i < left) words[i / kPerWord] |= static_cast<uint32_t>(from[i]) << (i % kPerWord * 8 * sizeof(T));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// sums [16 rows, 8 tokens] += weights [16, 32] * tokens [32, 8], int8.
__device__ __forceinline__ void mma_int8(int32_t (&sums)[4], uint32_t w0, uint32_t w1, uint32_t w2,
                                         uint32_t w3, uint32_t x0, uint32_t x1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1));
}

// sums [16 rows, 8 tokens] += weights [16, 16] * tokens [16, 8], bfloat16.
__device__ __forceinline__ void mma_bfloat16(float (&sums)[4], uint32_t w0, uint32_t w1, uint32_t w2,
                                             uint32_t w3, uint32_t x0, uint32_t x1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1));
}

// prmt with these selectors repeats the highest bit of bytes 0 and 1, or 2 and 3, over two bytes each.
__device__ __forceinline__ uint32_t low_halves(uint32_t bits) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %1, 0x9988;" : "=r"(mask) : "r"(bits));
  return mask;
}
__device__ __forceinline__ uint32_t high_halves(uint32_t bits) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %1, 0xbbaa;" : "=r"(mask) : "r"(bits));
  return mask;
}

// Eight weights, of which those remain whose bit of the byte is 1. The product puts four bits to the highest
// places of four bytes: its four copies of them do not overlap.
__device__ __forceinline__ uint4 keep(const uint4& w, uint32_t byte) {
  const uint32_t low = (byte & 15) * 0x10204080u, high = (byte >> 4) * 0x10204080u;
  return make_uint4(w.x & low_halves(low), w.y & high_halves(low), w.z & low_halves(high),
                    w.w & high_halves(high));
}

// As store_float.h rounds on the CPU: to nearest, ties to even, every NaN becomes 0x7fc0.
__device__ __forceinline__ void store(uint16_t* to, float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
__device__ __forceinline__ void store(float* to, float value) { *to = value; }

// Where the sums of a warp lie, [8 * kTokenTiles, kRows] with rows that begin 8 banks apart for every second
// token: the 32 lanes that store one register each meet 32 banks.
template <int kRows>
constexpr int kSumStride = kRows + 4;

// Stores register i of the sums of a tile: lane 4 g + t holds rows g and g + 8, tokens 2 t and 2 t + 1.
template <int kRows, typename Sum>
__device__ __forceinline__ void put_sums(Sum* sums, const Sum (&tile)[4], int row, int token, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sums[(token + 2 * t + i % 2) * kSumStride<kRows> + row + g + i / 2 * 8] = tile[i];
}

// "Programmatic Dependent Launch" of the CUDA programming guide: before wait_for_grid a kernel may run beside
// the one launched before it, and must not touch what that one writes.
__device__ __forceinline__ void wait_for_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_grid_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether this kernel has the wait, on a GPU of compute capability 9.0: it has as machine code for that GPU,
// and has not as the PTX of compute_80. No later GPU runs that machine code.
template <typename Kernel>
bool waits_for_grid(Kernel* kernel) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

}  // namespace few_tokens
}  // namespace dtm_fast
