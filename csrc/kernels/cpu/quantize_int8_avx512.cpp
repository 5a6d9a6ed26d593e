#include <immintrin.h>

#include <cstring>

#include "avx512_vectors.h"
#include "quantize_int8.h"

namespace dtm_fast {
namespace {

// qx[k] = clamp(round_half_even(float32(x[k] / scale)), -127, 127) for begin <= k < end, as it stands.
template <FloatType type>
void store_quotients(const void* x, int64_t begin, int64_t end, float scale, int8_t* qx) {
  const __m512i kLimit = _mm512_set1_epi32(127);
  // Values before rounding are at most absmax / scale, far inside int32: a denormal scale is rounded by at
  // most a factor of 2, so cvtps_epi32 never overflows and the clamp comes after it.
  for (int64_t k = begin; k < end; k += 16) {
    const __mmask16 lanes = first_lanes(end - k);
    __m512i q = _mm512_cvtps_epi32(_mm512_div_ps(load_16<type>(x, k, lanes), _mm512_set1_ps(scale)));
    q = _mm512_max_epi32(_mm512_min_epi32(q, kLimit), _mm512_sub_epi32(_mm512_setzero_si512(), kLimit));
    _mm512_mask_cvtepi32_storeu_epi8(qx + k, lanes, q);
  }
}

// Integers n near x / scale without vdivps, which takes the time of thirty multiplications, and the largest
// |x - n * scale| that was met. While that stays below (1/2 - 2^-16) * scale, n is the integer asked for: a
// quotient below 128 is rounded to float32 by at most 2^-18, the remainder by far less, so the rounded
// quotient is less than 1/2 away from n. And |n| <= 127, for the scale is absmax / 127 but for a rounding by
// 2^-24 of it.
struct Nearest {
  __m512 scale, reciprocal, largest;

  __m512i operator()(__m512 x) {
    // Of 1.5 * 2^23 + n the last bit counts ones, and n is in the low bits.
    const __m512 kInteger = _mm512_set1_ps(0x1.8p23f);
    const __m512 shifted = _mm512_fmadd_ps(x, reciprocal, kInteger);
    const __m512 remainder = _mm512_fnmadd_ps(_mm512_sub_ps(shifted, kInteger), scale, x);
    largest = _mm512_range_ps(largest, remainder, 0b1011);  // the larger of the magnitudes
    return _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_castps_si512(kInteger));
  }
};

// Elements k .. k + count - 1 of a row as bytes, count <= 64; 0 beyond.
template <FloatType type>
[[gnu::always_inline]] inline __m512i nearest_64(const void* x, int64_t k, int64_t count, Nearest& nearest) {
  if (type == FloatType::kFloat32) {
    __m512i q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      q[i] = nearest(load_16<type>(x, k + 16 * i, first_lanes(count > 16 * i ? count - 16 * i : 0)));
    }
    const __m512i words01 = _mm512_packs_epi32(q[0], q[1]), words23 = _mm512_packs_epi32(q[2], q[3]);
    // Packing keeps to each quarter of a vector: there lie four of q[0], then four of q[1] ...
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words01, words23));
  }
  __m512i words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __mmask32 lanes = first_words(count > 32 * i ? count - 32 * i : 0);
    const __m512i pairs = _mm512_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + k + 32 * i);
    const __m512i even = nearest(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
    const __m512i odd = nearest(_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))));
    words[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
  }
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return _mm512_permutexvar_epi64(order, _mm512_packs_epi16(words[0], words[1]));
}

template <FloatType type>
void store_nearest(const void* x, int64_t K, float scale, int8_t* qx) {
  Nearest nearest;
  nearest.scale = _mm512_set1_ps(scale);
  nearest.reciprocal = _mm512_div_ps(_mm512_set1_ps(1.0f), nearest.scale);
  const __m512 limit = _mm512_mul_ps(nearest.scale, _mm512_set1_ps(0.5f - 0x1p-16f));
  const auto certain = [&] { return _mm512_cmp_ps_mask(nearest.largest, limit, _CMP_NLT_UQ) == 0; };
  int64_t k = 0;
  for (; k + 64 <= K; k += 64) {
    nearest.largest = _mm512_setzero_ps();
    _mm512_storeu_si512(qx + k, nearest_64<type>(x, k, 64, nearest));
    if (__builtin_expect(!certain(), 0)) store_quotients<type>(x, k, k + 64, scale, qx);
  }
  if (k == K) return;
  nearest.largest = _mm512_setzero_ps();
  _mm512_mask_storeu_epi8(qx + k, first_bytes(K - k), nearest_64<type>(x, k, K - k, nearest));
  if (!certain()) store_quotients<type>(x, k, K, scale, qx);
}

// The bits of the largest |x|. They order like integers, with infinity and the NaNs above every finite
// number.
template <FloatType type>
int32_t largest_bits(const void* x, int64_t K) {
  __m512i largest = _mm512_setzero_si512();
  int64_t k = 0;
  if (type == FloatType::kFloat32) {
    const __m512i kMagnitude = _mm512_set1_epi32(0x7fffffff);
    const auto take = [&](__m512 value) {
      largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(value), kMagnitude));
    };
    for (; k + 16 <= K; k += 16) take(_mm512_loadu_ps(static_cast<const float*>(x) + k));
    if (k < K) take(load_16<type>(x, k, first_lanes(K - k)));
    return _mm512_reduce_max_epi32(largest);
  }
  const __m512i kMagnitude = _mm512_set1_epi16(0x7fff);
  const auto take = [&](__m512i bits) {
    largest = _mm512_max_epi16(largest, _mm512_and_si512(bits, kMagnitude));
  };
  const uint16_t* row = static_cast<const uint16_t*>(x);
  for (; k + 32 <= K; k += 32) take(_mm512_loadu_si512(row + k));
  if (k < K) take(_mm512_maskz_loadu_epi16(first_words(K - k), row + k));
  const __m512i upper = _mm512_and_si512(largest, _mm512_set1_epi32(-65536));
  return _mm512_reduce_max_epi32(_mm512_max_epi32(upper, _mm512_slli_epi32(largest, 16)));
}

template <FloatType type>
void quantize_row(const void* x, int64_t K, float scale, int8_t* qx) {
  // Below this a reciprocal could overflow and a remainder be denormal.
  constexpr float kSmallest = 0x1p-100f;
  if (scale >= kSmallest) {
    store_nearest<type>(x, K, scale, qx);
  } else if (scale > 0.0f) {
    store_quotients<type>(x, 0, K, scale, qx);
  } else {
    std::memset(qx, 0, static_cast<size_t>(K));  // 0 or NaN
  }
}

template <FloatType type>
void quantize_rows(const void* x, int64_t x_stride, int64_t rows, int64_t K, int8_t* qx, float* scale) {
  const auto row = [&](int64_t i) { return static_cast<const char*>(x) + i * x_stride * size_of(type); };
  // All scales first: what follows a maximum (its reduction, two divisions) takes long, and the maximum of
  // the next row does not wait for it.
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t bits = largest_bits<type>(row(i), K);
    float absmax;
    std::memcpy(&absmax, &bits, sizeof absmax);
    scale[i] = bits >= 0x7f800000 ? __builtin_nanf("") : absmax / 127.0f;
  }
  for (int64_t i = 0; i < rows; ++i) quantize_row<type>(row(i), K, scale[i], qx + i * K);
}

}  // namespace

void quantize_int8_rows_avx512(const void* x, FloatType x_type, int64_t x_stride, int64_t rows, int64_t K,
                               int8_t* qx, float* scale) {
  const auto quantize = x_type == FloatType::kFloat32 ? quantize_rows<FloatType::kFloat32>
                                                      : quantize_rows<FloatType::kBfloat16>;
  quantize(x, x_stride, rows, K, qx, scale);
}

}  // namespace dtm_fast
