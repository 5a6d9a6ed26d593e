// Causal attention of one head over keys and values, by products of packed rows with packed matrices. The
// sums of a position run over the keys in ascending order, whatever other positions are computed with it.
// Included only by files compiled for at least AVX-512; everything is in an anonymous namespace, so that no
// copy can reach a file of a lower instruction set.
#pragma once

#include "layer_rows_avx512.h"

namespace dtm_fast {
namespace {

// The keys and values of one head, and what the product of a block of rows needs. Rows of pairs multiply as
// exactly as rows of float32 where all factors are numbers of bfloat16: in a model of that dtype queries,
// keys and values are, and the weights are rounded to it.
template <typename Rows>
class AttentionHead {
  using Lanes = typename Rows::Lanes;

 public:
  static constexpr int64_t kRows = Rows::kBlockRows;

  // scratch: size(head_dim, context) floats
  AttentionHead(float* scratch, int64_t head_dim, int64_t context)
      : head_dim_(head_dim), context_(whole_panels(context)) {
    keys_ = scratch;
    values_ = keys_ + context_ * Rows::panel_floats(head_dim);
    queries_ = values_ + whole_panels(head_dim) * Rows::panel_floats(context_);
    scores_ = queries_ + Rows::size(kRows, head_dim);
    weights_ = scores_ + kRows * context_;
  }

  static int64_t size(int64_t head_dim, int64_t context) {
    const int64_t keys = whole_panels(context);
    return keys * Rows::panel_floats(head_dim) + whole_panels(head_dim) * Rows::panel_floats(keys) +
           Rows::size(kRows, head_dim) + kRows * keys + Rows::size(kRows, keys);
  }

  // keys, values: [count, head_dim] of row stride `stride`
  void load(const float* keys, const float* values, int64_t stride, int64_t count) {
    for (int64_t t = 0; t < count; t += kPanelCols) {
      const int64_t rows = count - t < kPanelCols ? count - t : kPanelCols;
      pack_panel<Lanes>(
          rows, head_dim_, [&](int64_t j, int64_t k) { return lanes(keys + (t + j) * stride, k); },
          keys_ + t * Rows::panel_floats(head_dim_));
    }
    for (int64_t e = 0; e < head_dim_; e += kPanelCols) {
      float* panel = values_ + e * Rows::panel_floats(context_);
      for (int64_t t = 0; t < context_; t += Lanes::kLaneK) {
        for (int64_t half = 0; half < kPanelCols; half += 16, panel += 16) {
          const auto value = [&](int64_t row) {  // zeros behind the last
            const int64_t depth = row < count ? head_dim_ : 0;
            return finite_value(load_vector(values + row * stride, e + half, depth), row);
          };
          if constexpr (Lanes::kLaneK == 1) {
            _mm512_storeu_ps(panel, value(t));
          } else {
            _mm512_storeu_si512(panel, alternate(value(t), value(t + 1)));
          }
        }
      }
    }
  }

  // out[i] = softmax(scale * queries[i] @ keys.T over keys 0 .. position + i) @ values, for i < rows <=
  // kRows; out has room for Rows::written_rows(rows)
  template <LayerArithmetic kArithmetic>
  void attend(const float* queries, int64_t q_stride, int64_t rows, int64_t position, float scale, float* out,
              int64_t out_stride) const {
    const auto all = [](int64_t) { return true; };
    const int64_t keys = whole_panels(position + rows);
    const Rows q = {queries_, rows, head_dim_}, weights = {weights_, rows, keys};
    for (int64_t i = 0; i < rows; ++i) copy_row(queries + i * q_stride, nullptr, i, q);
    multiply_rows(q, keys_, nullptr, keys, false, scores_, context_, all);
    float inverse[kRows];
    for (int64_t i = 0; i < rows; ++i) {
      inverse[i] = softmax<kArithmetic>(scores_ + i * context_, position + i + 1, scale, i, weights);
    }
    for (int64_t e = 0; e < head_dim_; e += kPanelCols) {
      const int64_t cols = head_dim_ - e < kPanelCols ? head_dim_ - e : kPanelCols;
      multiply_rows(weights, values_ + e * Rows::panel_floats(context_), nullptr, cols, false, out + e,
                    out_stride, all);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const __m512 factor = _mm512_set1_ps(inverse[i]);
      for (int64_t e = 0; e < head_dim_; e += 16) {
        float* row = out + i * out_stride;
        const __m512 value = _mm512_mul_ps(load_vector(row, e, head_dim_), factor);
        store_vector(row, e, head_dim_, stored<kArithmetic>(value));
      }
    }
  }

 private:
  static int64_t whole_panels(int64_t count) { return (count + kPanelCols - 1) / kPanelCols * kPanelCols; }

  __m512i lanes(const float* row, int64_t k) const {
    if constexpr (Lanes::kLaneK == 1) {
      return _mm512_castps_si512(load_vector(row, k, head_dim_));
    } else {
      return Lanes::pairs(load_vector(row, k, head_dim_), load_vector(row, k + 16, head_dim_));
    }
  }

  // Pairs of numbers of bfloat16, of which the first is in the lower half.
  static __m512i alternate(__m512 first, __m512 second) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16),
                           _mm512_and_si512(_mm512_castps_si512(second), upper));
  }

  // Positions before t multiply the value of t by 0, which would give NaN if it is not finite: its key
  // becomes NaN instead, whose scores they do not look at.
  __m512 finite_value(__m512 value, int64_t t) {
    constexpr int kNotFinite = 0x99;  // infinities, and both kinds of NaN
    const __mmask16 bad = _mm512_fpclass_ps_mask(value, kNotFinite);
    if (bad != 0) {
      float* const key = keys_ + t / kPanelCols * kPanelCols * Rows::panel_floats(head_dim_) + t % kPanelCols;
      _mm_store_ss(key, _mm_castsi128_ps(_mm_set1_epi32(-1)));  // NaN, also as a pair
    }
    return _mm512_maskz_mov_ps(_knot_mask16(bad), value);
  }

  // Row i of weights = exp(scale * (scores - their maximum)) of the first `valid` keys, zeros behind; returns
  // the inverse of their sum.
  template <LayerArithmetic kArithmetic>
  static float softmax(const float* scores, int64_t valid, float scale, int64_t i, const Rows& weights) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    __m512 largest = lowest;
    for (int64_t t = 0; t < valid; t += 16) {
      const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + t), factor);
      largest = _mm512_mask_max_ps(largest, first_lanes(valid - t), largest, score);
    }
    const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    __m512 sum = _mm512_setzero_ps();
    __mmask16 nan = 0;
    const auto weight = [&](int64_t t) {
      if (t >= valid) return _mm512_setzero_ps();
      const __mmask16 lanes = first_lanes(valid - t);
      const __m512 below = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + t), factor), shift);
      nan = static_cast<__mmask16>(nan | _mm512_mask_cmp_ps_mask(lanes, below, below, _CMP_UNORD_Q));
      const __m512 found = _mm512_maskz_mov_ps(lanes, exp_nonpositive(below));
      sum = _mm512_add_ps(sum, found);
      return stored<kArithmetic>(found);
    };
    for (int64_t t = 0; t < weights.depth(); t += 32) {
      const __m512 low = weight(t), high = weight(t + 16);
      weights.store_32(i, t, low, high);
    }
    return nan != 0 ? __builtin_nanf("") : 1.0f / _mm512_reduce_add_ps(sum);  // exp_nonpositive(NaN) is 0
  }

  int64_t head_dim_, context_;
  float *keys_, *values_, *queries_, *scores_, *weights_;
};

}  // namespace
}  // namespace dtm_fast
