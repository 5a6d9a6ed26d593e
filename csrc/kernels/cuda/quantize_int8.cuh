// The arithmetic of quantize_int8 on the GPU, for every kernel that quantizes.
#pragma once

#include <cstdint>

namespace dtm_fast {
namespace quantization {

constexpr uint32_t kInfinity = 0x7f800000u;
// 1.5 * 2^23: there the float32 lie 1 apart, so that a sum with it ends with the other summand, rounded half
// to even, in two's complement.
constexpr float kToInteger = 12582912.0f;

// T is an unsigned integer of the size of an element: its bits.

// Element i of 16 bytes as the bits of a float32.
template <typename T>
__device__ __forceinline__ uint32_t element(const uint4& chunk, int i) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  if constexpr (sizeof(T) == 4) {
    return words[i];
  } else {
    return i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u;
  }
}

// As unsigned integers, the absolute bits of NaN and infinity are the largest: no maximum loses them, as
// fmaxf would.
template <typename T>
__device__ __forceinline__ uint32_t largest(uint32_t before, const uint4& chunk) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i)
    before = max(before, element<T>(chunk, i) & 0x7fffffffu);
  return before;
}

struct Divisor {
  float scale, reciprocal;
  bool usable, far_from_underflow;
};

__device__ inline Divisor divisor_of(uint32_t absmax) {
  Divisor divisor;
  divisor.scale =
      absmax < kInfinity ? __fdiv_rn(__uint_as_float(absmax), 127.0f) : __uint_as_float(0x7fc00000u);
  divisor.usable = divisor.scale > 0.0f;
  divisor.far_from_underflow = divisor.scale >= 0x1p-90f;
  divisor.reciprocal = __fdiv_rn(1.0f, divisor.scale);
  return divisor;
}

// Byte 0: round(value / scale), for a scale that is far from underflow.
//
// The correctly rounded quotient in five full-rate instructions: a quotient that is off by less than a unit
// in the last place, corrected by its exact remainder times the correctly rounded reciprocal (Markstein 1990,
// "Computation of elementary functions on the IBM RISC System/6000 processor"). Remainders of
// quotients near a half and above do not underflow, and smaller quotients become 0 anyway. The largest is
// 127.00002: nothing to clamp.
__device__ __forceinline__ uint32_t quantized_fast(float value, const Divisor& divisor) {
  const float first = __fmul_rn(value, divisor.reciprocal);
  const float second = __fmaf_rn(__fmaf_rn(-first, divisor.scale, value), divisor.reciprocal, first);
  const float quotient = __fmaf_rn(__fmaf_rn(-second, divisor.scale, value), divisor.reciprocal, second);
  return __float_as_uint(__fadd_rn(quotient, kToInteger));
}

// Byte 0: round(clamp(value / scale)), for every scale.
__device__ __forceinline__ uint32_t quantized_slow(float value, const Divisor& divisor) {
  if (!divisor.usable) return 0;
  const float quotient = fminf(fmaxf(__fdiv_rn(value, divisor.scale), -127.0f), 127.0f);
  return __float_as_uint(__fadd_rn(quotient, kToInteger));
}

// Byte 0 of each.
__device__ __forceinline__ uint32_t pack(const uint32_t (&bytes)[4]) {
  const uint32_t low = __byte_perm(bytes[0], bytes[1], 0x0040),
                 high = __byte_perm(bytes[2], bytes[3], 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// 16 bytes of a row: 4 numbers in each word.
template <typename T>
__device__ __forceinline__ void quantize_chunk(const uint4& chunk, const Divisor& divisor,
                                               uint32_t (&words)[4 / sizeof(T)]) {
  constexpr int kChunk = 16 / sizeof(T);
  uint32_t bytes[kChunk / 4][4];
  if (divisor.far_from_underflow) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      bytes[i / 4][i % 4] = quantized_fast(__uint_as_float(element<T>(chunk, i)), divisor);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      bytes[i / 4][i % 4] = quantized_slow(__uint_as_float(element<T>(chunk, i)), divisor);
  }
#pragma unroll
  for (int i = 0; i < kChunk / 4; ++i) words[i] = pack(bytes[i]);
}

}  // namespace quantization
}  // namespace dtm_fast
