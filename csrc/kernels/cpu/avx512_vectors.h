// Vectors of 16 lanes: their tails, their loads, their transposition. Included only by files compiled for at
// least AVX-512; everything is in an anonymous namespace, so that no copy can reach a file of a lower
// instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "float_type.h"

// What hands over arrays of vectors, which would go through memory if it were called as a function, or works
// with tiles, whose numbers the compiler must know.
#define DTM_FAST_INLINE __attribute__((always_inline)) inline

namespace dtm_fast {
namespace {

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << count) - 1u);
}

inline __mmask32 first_words(int64_t count) {
  return count >= 32 ? __mmask32{0xffffffff} : (__mmask32{1} << count) - 1;
}

inline __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// Elements index .. index + 15 of a row, widened to float32; 0 where the lane is not asked for, which is not
// read.
template <FloatType type>
inline __m512 load_16(const void* x, int64_t index, __mmask16 lanes) {
  if (type == FloatType::kFloat32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + index);
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + index);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// As bfloat16_bits of store_float.h, each in the lower half of its lane.
inline __m512i bfloat16_lanes(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), nan, 0x7fc0);
}

// In place: r[j] lane i = old r[i] lane j. First inside each block of 4 x 4, then between the blocks.
DTM_FAST_INLINE void transpose_16x16(__m512i r[16]) {
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {
    const __m512i low01 = _mm512_unpacklo_epi32(r[g], r[g + 1]);
    const __m512i high01 = _mm512_unpackhi_epi32(r[g], r[g + 1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[g + 2], r[g + 3]);
    const __m512i high23 = _mm512_unpackhi_epi32(r[g + 2], r[g + 3]);
    r[g] = _mm512_unpacklo_epi64(low01, low23);
    r[g + 1] = _mm512_unpackhi_epi64(low01, low23);
    r[g + 2] = _mm512_unpacklo_epi64(high01, high23);
    r[g + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    r[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    r[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    r[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    r[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
}

}  // namespace
}  // namespace dtm_fast
