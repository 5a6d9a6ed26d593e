// Greedy token and negative log-likelihood over the vocabulary, without the logits.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"

namespace dtm_fast {

// hidden    : [T, D] of type, row stride hidden_stride
// lm_head   : [V, D] of type, row stride lm_head_stride, V > 0
// reference : [T] int64 in [0, V)
// mismatch  : [T] bool bytes
// nll       : [T] float32
//
//   logits[t, v] = type(sum_d float32(hidden[t, d]) * float32(lm_head[v, d]))     (order of the sum:
//   gemm_tile.h) mismatch[t]  = argmax_v logits[t, v] != reference[t]                         (lowest v wins,
//   NaN is the largest) nll[t]       = log sum_v exp(logits[t, v]) - logits[t, reference[t]]         (NaN
//   where a logit is NaN)
//
// Working memory is O(T * V / kVocabularyTile). The vocabulary is cut into tiles of fixed size, which are
// merged in order, so that the result depends on neither the batch nor the threads.
struct TokenDivergence {
  FloatType type;
  const void* hidden;
  int64_t hidden_stride;
  const void* lm_head;
  int64_t lm_head_stride;
  const int64_t* reference;
  int64_t T, V, D;
  uint8_t* mismatch;
  float* nll;
};

void token_divergence(CpuIsa isa, const TokenDivergence& args, int num_threads);

constexpr int64_t kVocabularyTile = 256;

// What one row of one tile says: its largest logit, the lowest position that holds it, and sum exp(logit -
// max). A NaN is the largest logit, at its first position; sum_exp then means nothing, nor does it when max
// is infinite.
struct LogitSummary {
  float max;
  float sum_exp;
  int64_t argmax;
};

// logits: [count], count > 0 a multiple of 16; fill a shorter row with -infinity.
using SummarizeLogits = LogitSummary(const float* logits, int64_t count);
SummarizeLogits summarize_logits_avx2;
SummarizeLogits summarize_logits_avx512;

}  // namespace dtm_fast
