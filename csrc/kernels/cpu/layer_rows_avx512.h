// What a decoder layer does to single rows between its products. Included only by files compiled for at least
// AVX-512; everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction
// set.
#pragma once

#include <cmath>

#include "decoder_layer.h"
#include "exp_avx512.h"
#include "packed_rows_avx512.h"

namespace dtm_fast {
namespace {

// A row in vectors of 16, zeros beyond its end.
DTM_FAST_INLINE __m512 load_vector(const float* row, int64_t k, int64_t depth) {
  return _mm512_maskz_loadu_ps(k < depth ? first_lanes(depth - k) : __mmask16{0}, row + k);
}

DTM_FAST_INLINE void store_vector(float* row, int64_t k, int64_t depth, __m512 value) {
  if (k < depth) _mm512_mask_storeu_ps(row + k, first_lanes(depth - k), value);
}

// Rounded as Hugging Face stores it; a denormal becomes zero. Only files compiled for AVX512-BF16 round.
template <LayerArithmetic kArithmetic>
DTM_FAST_INLINE __m512 stored(__m512 value) {
#if defined(__AVX512BF16__)
  if (kArithmetic == LayerArithmetic::kBfloat16) {
    const __m512i words = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
#else
  static_assert(kArithmetic != LayerArithmetic::kBfloat16, "rounding needs AVX512-BF16");
#endif
  return value;
}

// 1 / sqrt(mean of squares + eps) of the row whose vectors value(k) gives.
template <typename Value>
DTM_FAST_INLINE __m512 inverse_rms(int64_t depth, float eps, const Value& value) {
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t k = 0; k < depth; k += 32) {
    const __m512 low = value(k), high = value(k + 16);
    sum[0] = _mm512_fmadd_ps(low, low, sum[0]);
    sum[1] = _mm512_fmadd_ps(high, high, sum[1]);
  }
  const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / static_cast<float>(depth);
  return _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
}

template <LayerArithmetic kArithmetic>
DTM_FAST_INLINE __m512 normed(__m512 value, __m512 inverse, __m512 weight) {
  return stored<kArithmetic>(_mm512_mul_ps(weight, stored<kArithmetic>(_mm512_mul_ps(value, inverse))));
}

// row of `rows` = RMS norm of x (kChange: of base + x less that of base, the latter also to base_rows where
// there are any; x nullptr: 0)
template <LayerArithmetic kArithmetic, typename Rows>
void norm_row(const float* x, const float* base, const float* weight, float eps, int64_t row,
              const Rows& rows, const Rows* base_rows) {
  const int64_t depth = rows.depth();
  if (kArithmetic != LayerArithmetic::kChange) {
    const auto value = [&](int64_t k) { return load_vector(x, k, depth); };
    const __m512 inverse = inverse_rms(depth, eps, value);
    for (int64_t k = 0; k < depth; k += 32) {
      const auto at = [&](int64_t j) {
        return normed<kArithmetic>(value(j), inverse, load_vector(weight, j, depth));
      };
      rows.store_32(row, k, at(k), at(k + 16));
    }
    return;
  }
  const auto before = [&](int64_t k) { return load_vector(base, k, depth); };
  const __m512 inverse = inverse_rms(depth, eps, before);
  if (base_rows != nullptr) {
    for (int64_t k = 0; k < depth; k += 32) {
      const auto at = [&](int64_t j) {
        return normed<kArithmetic>(before(j), inverse, load_vector(weight, j, depth));
      };
      base_rows->store_32(row, k, at(k), at(k + 16));
    }
  }
  if (x == nullptr) return;
  const auto after = [&](int64_t k) { return _mm512_add_ps(before(k), load_vector(x, k, depth)); };
  const __m512 new_inverse = inverse_rms(depth, eps, after);
  for (int64_t k = 0; k < depth; k += 32) {
    const auto at = [&](int64_t j) {
      const __m512 w = load_vector(weight, j, depth);
      return _mm512_sub_ps(normed<kArithmetic>(after(j), new_inverse, w),
                           normed<kArithmetic>(before(j), inverse, w));
    };
    rows.store_32(row, k, at(k), at(k + 16));
  }
}

// row of `rows` = x, or x - base where there is a base
template <typename Rows>
void copy_row(const float* x, const float* base, int64_t row, const Rows& rows) {
  const int64_t depth = rows.depth();
  const auto at = [&](int64_t k) {
    const __m512 value = load_vector(x, k, depth);
    return base == nullptr ? value : _mm512_sub_ps(value, load_vector(base, k, depth));
  };
  for (int64_t k = 0; k < depth; k += 32) rows.store_32(row, k, at(k), at(k + 16));
}

// exp(x) of any x: exp(-|x|) or its inverse.
DTM_FAST_INLINE __m512 sigmoid(__m512 x) {
  // 1 / (1 + exp(-x)), and for negative x exp(x) / (1 + exp(x)), so that nothing overflows.
  const __m512 small = exp_nonpositive(_mm512_or_ps(x, _mm512_set1_ps(-0.0f)));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  return _mm512_div_ps(_mm512_mask_mov_ps(one, negative, small), _mm512_add_ps(one, small));
}

template <LayerArithmetic kArithmetic>
DTM_FAST_INLINE __m512 gated(__m512 gate, __m512 up) {
  const __m512 silu = stored<kArithmetic>(_mm512_mul_ps(gate, sigmoid(gate)));
  return stored<kArithmetic>(_mm512_mul_ps(silu, up));
}

// 2^x up to 2^-14 of it, for x <= 126: a Taylor polynomial around the nearest integer.
DTM_FAST_INLINE __m512 rough_exp2(__m512 x) {
  constexpr float kLn2 = 0.693147181f;
  constexpr int kFromNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 r = _mm512_reduce_ps(x, kFromNearest);
  __m512 p = _mm512_set1_ps(kLn2 * kLn2 * kLn2 * kLn2 / 24.0f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kLn2 * kLn2 * kLn2 / 6.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kLn2 * kLn2 / 2.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kLn2));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
}

// gated(gate + gate_change, up + up_change) - gated(gate, up), up to 2^-11 of the terms of
//   sigmoid (gate_change new_up + gate up_change) + sigmoid_change new_gate new_up,
// which are no larger than the changes: those of a difference of two products are. With s = exp(-gate), d = 1
// + s and t = exp(-gate_change) - 1, the sigmoids are 1 / d and 1 / (d + s t), and one inverse gives both.
DTM_FAST_INLINE __m512 gated_change(__m512 gate, __m512 up, __m512 gate_change, __m512 up_change) {
  const __m512 new_gate = _mm512_add_ps(gate, gate_change), new_up = _mm512_add_ps(up, up_change);
  // Where a gate changes by more than 1/2, the polynomial is too far off. NaN is more, too.
  const __m512 half = _mm512_set1_ps(0.5f), size = _mm512_abs_ps(gate_change);
  if (_mm512_cmp_ps_mask(size, half, _CMP_NLE_UQ) != 0) {
    return _mm512_sub_ps(gated<LayerArithmetic::kChange>(new_gate, new_up),
                         gated<LayerArithmetic::kChange>(gate, up));
  }
  __m512 t = _mm512_set1_ps(-1.0f / 120.0f);
  t = _mm512_fmadd_ps(t, gate_change, _mm512_set1_ps(1.0f / 24.0f));
  t = _mm512_fmadd_ps(t, gate_change, _mm512_set1_ps(-1.0f / 6.0f));
  t = _mm512_fmadd_ps(t, gate_change, half);
  t = _mm512_fmadd_ps(t, gate_change, _mm512_set1_ps(-1.0f));
  // Much beyond 2^60 the square of d would overflow: no sigmoid is computed below 2^-60.
  const __m512 exponent = _mm512_mul_ps(gate, _mm512_set1_ps(-1.44269504f));
  const __m512 s = rough_exp2(_mm512_min_ps(_mm512_set1_ps(60.0f), exponent));
  const __m512 st = _mm512_mul_ps(_mm512_mul_ps(t, gate_change), s);
  const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), s), new_d = _mm512_add_ps(d, st);
  const __m512 inverse = _mm512_rcp14_ps(_mm512_mul_ps(d, new_d));
  const __m512 sigmoid = _mm512_mul_ps(new_d, inverse), sigmoid_fall = _mm512_mul_ps(st, inverse);
  const __m512 product_change = _mm512_fmadd_ps(gate_change, new_up, _mm512_mul_ps(gate, up_change));
  const __m512 fall = _mm512_mul_ps(_mm512_mul_ps(new_gate, new_up), sigmoid_fall);
  return _mm512_fmsub_ps(product_change, sigmoid, fall);
}

// One head of E elements in place: its norm if it has one, then the rotation of its position.
template <LayerArithmetic kArithmetic>
void rotate_head(float* head, int64_t E, const float* norm, float eps, const float* cosine,
                 const float* sine) {
  if (norm != nullptr) {
    const auto value = [&](int64_t k) { return load_vector(head, k, E); };
    const __m512 inverse = inverse_rms(E, eps, value);
    for (int64_t k = 0; k < E; k += 16) {
      store_vector(head, k, E, normed<kArithmetic>(value(k), inverse, load_vector(norm, k, E)));
    }
  }
  const int64_t half = E / 2;
  const auto times = [](__m512 a, __m512 b) { return stored<kArithmetic>(_mm512_mul_ps(a, b)); };
  for (int64_t k = 0; k < half; k += 16) {
    const __m512 low = load_vector(head, k, half), high = load_vector(head + half, k, half);
    const __m512 new_low =
        _mm512_sub_ps(times(low, load_vector(cosine, k, half)), times(high, load_vector(sine, k, half)));
    const __m512 new_high = _mm512_add_ps(times(high, load_vector(cosine + half, k, half)),
                                          times(low, load_vector(sine + half, k, half)));
    store_vector(head, k, half, stored<kArithmetic>(new_low));
    store_vector(head + half, k, half, stored<kArithmetic>(new_high));
  }
}

}  // namespace
}  // namespace dtm_fast
