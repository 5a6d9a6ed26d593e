// Causal attention of one head over keys and values in float32, by the micro-kernel of gemm_panel_avx512.h:
// keys and values are packed into panels as weights are. The sums of a position run over the keys in
// ascending order, in blocks of kGemmBlockK, whatever other positions are computed with it. Included only by
// files compiled for at least AVX-512; everything is in an anonymous namespace, so that no copy can reach a
// file of a lower instruction set.
#pragma once

#include "layer_rows_avx512.h"

namespace dtm_fast {
namespace {

// The keys and values of one head, and what the product of a block of rows needs.
class AttentionHead {
 public:
  // scratch: size(head_dim, context) floats
  AttentionHead(float* scratch, int64_t head_dim, int64_t context)
      : head_dim_(head_dim), context_(whole_panels(context)) {
    keys_ = scratch;
    values_ = keys_ + context_ * head_lanes();
    queries_ = values_ + context_ * whole_panels(head_dim);
    scores_ = queries_ + kMaxRows * kGemmBlockK;
    weights_ = scores_ + kMaxRows * context_;
  }

  static int64_t size(int64_t head_dim, int64_t context) {
    const int64_t keys = whole_panels(context);
    const int64_t blocks = (keys + kGemmBlockK - 1) / kGemmBlockK;
    return keys * panel_lanes<FloatLanes>(head_dim) + keys * whole_panels(head_dim) + kMaxRows * kGemmBlockK +
           kMaxRows * keys + kMaxRows * kGemmBlockK * blocks;
  }

  // keys, values: [count, head_dim] of row stride `stride`
  void load(const float* keys, const float* values, int64_t stride, int64_t count) {
    for (int64_t t = 0; t < count; t += kPanelCols) {
      const int64_t rows = count - t < kPanelCols ? count - t : kPanelCols;
      pack_panel<FloatLanes>(
          rows, head_dim_,
          [&](int64_t j, int64_t k) {
            return _mm512_castps_si512(load_vector(keys + (t + j) * stride, k, head_dim_));
          },
          keys_ + t * head_lanes());
    }
    for (int64_t e = 0; e < head_dim_; e += kPanelCols) {
      float* panel = values_ + e * context_;
      for (int64_t t = 0; t < context_; ++t) {
        const float* row = values + t * stride + e;
        const int64_t cols = t < count ? head_dim_ - e : 0;  // zeros behind the last
        store_value(load_vector(row, 0, cols), t, panel + t * kPanelCols);
        store_value(load_vector(row, 16, cols), t, panel + t * kPanelCols + 16);
      }
    }
  }

  // out[i] = softmax(scale * queries[i] @ keys.T over keys 0 .. position + i) @ values, for i < rows <=
  // kMaxRows
  template <LayerArithmetic kArithmetic>
  void attend(const float* queries, int64_t q_stride, int64_t rows, int64_t position, float scale, float* out,
              int64_t out_stride) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < head_lanes(); k += 16) {
        _mm512_storeu_ps(queries_ + i * kGemmBlockK + k, load_vector(queries + i * q_stride, k, head_dim_));
      }
    }
    const int64_t keys = whole_panels(position + rows);
    for (int64_t t = 0; t < keys; t += kPanelCols) {
      kMultiply<FloatLanes>[rows](queries_, keys_ + t* head_lanes(), head_lanes(), true, scores_ + t,
                                  context_, kPanelCols);
    }
    float inverse[kMaxRows];
    for (int64_t i = 0; i < rows; ++i) {
      inverse[i] = softmax<kArithmetic>(scores_ + i * context_, position + i + 1, keys, scale,
                                        weights_ + i * kGemmBlockK);
    }
    for (int64_t e = 0; e < head_dim_; e += kPanelCols) {
      const int64_t cols = head_dim_ - e < kPanelCols ? head_dim_ - e : kPanelCols;
      for (int64_t t = 0; t < keys; t += kGemmBlockK) {
        const int64_t lanes = keys - t < kGemmBlockK ? keys - t : kGemmBlockK;
        kMultiply<FloatLanes>[rows](weights_ + t* kMaxRows, values_ + e* context_ + t* kPanelCols, lanes,
                                    t == 0, out + e, out_stride, cols);
      }
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
  int64_t head_lanes() const { return panel_lanes<FloatLanes>(head_dim_); }

  // Positions before t multiply the value of t by 0, which would give NaN if it is not finite: its key
  // becomes NaN instead, whose scores they do not look at.
  void store_value(__m512 value, int64_t t, float* to) {
    constexpr int kNotFinite = 0x99;  // infinities, and both kinds of NaN
    const __mmask16 bad = _mm512_fpclass_ps_mask(value, kNotFinite);
    if (bad != 0) keys_[t / kPanelCols * kPanelCols * head_lanes() + t % kPanelCols] = __builtin_nanf("");
    _mm512_storeu_ps(to, _mm512_maskz_mov_ps(_knot_mask16(bad), value));
  }

  // weights = exp(scale * (scores - their maximum)) of the first `valid` keys, zeros up to `keys`, packed;
  // returns the inverse of their sum.
  template <LayerArithmetic kArithmetic>
  static float softmax(const float* scores, int64_t valid, int64_t keys, float scale, float* weights) {
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
    for (int64_t t = 0; t < keys; t += 16) {
      const __mmask16 lanes = t < valid ? first_lanes(valid - t) : __mmask16{0};
      const __m512 below = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + t), factor), shift);
      nan = static_cast<__mmask16>(nan | _mm512_mask_cmp_ps_mask(lanes, below, below, _CMP_UNORD_Q));
      const __m512 weight = _mm512_maskz_mov_ps(lanes, exp_nonpositive(below));
      sum = _mm512_add_ps(sum, weight);
      float* to = weights + t / kGemmBlockK * (kMaxRows * kGemmBlockK) + t % kGemmBlockK;
      _mm512_storeu_ps(to, stored<kArithmetic>(weight));
    }
    return nan != 0 ? __builtin_nanf("") : 1.0f / _mm512_reduce_add_ps(sum);  // exp_nonpositive(NaN) is 0
  }

  int64_t head_dim_, context_;
  float *keys_, *values_, *queries_, *scores_, *weights_;
};

}  // namespace
}  // namespace dtm_fast
