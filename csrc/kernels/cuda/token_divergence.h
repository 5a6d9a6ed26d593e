// Greedy token and negative log-likelihood over the vocabulary, without the logits, on the GPU.
#pragma once

#include <cstdint>

#include "../cpu/float_type.h"
#include "kernel_choice.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dtm_fast {

// What one row of one tile of the vocabulary says. A NaN is the largest logit, at its first position.
struct LogitSummary {
  float max;       // the largest logit
  float sum_exp;   // sum exp(logit - max); means nothing where max is NaN or infinite
  int32_t argmax;  // the lowest token id that holds max
};

// hidden    : [T, D] of type, row stride hidden_stride
// lm_head   : [V, D] of type, row stride lm_head_stride, 0 < V < 2^31
// reference : [T] int64 in [0, V)
// mismatch  : [T] bool bytes
// nll       : [T] float32
// summaries : [ceil(V / kSmallestVocabularyTile), T], working memory; own_logit: [T] float32, working memory
//
//   logits[t, v] = type(sum_d float32(hidden[t, d]) * float32(lm_head[v, d]))
//   mismatch[t]  = argmax_v logits[t, v] != reference[t]       (lowest v wins, NaN is the largest)
//   nll[t]       = log sum_v exp(logits[t, v]) - logits[t, reference[t]]     (NaN where a logit is NaN)
//
// Two stages: one block per tile of rows and of the vocabulary writes the summaries of its rows, then one
// thread per row merges the tiles in the order of their ids. Both are deterministic; a row does not depend on
// the others.
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
  LogitSummary* summaries;
  float* own_logit;
};

constexpr int64_t kSmallestVocabularyTile = 128;

// Whether a kernel can take these arguments on the current device; kBest and kMma always can.
bool token_divergence_possible(CudaKernel kernel, const TokenDivergence& args);

// Queued on the stream of the current device; does not wait. Throws std::runtime_error if a launch fails, or
// the kernel cannot take the arguments. kBest depends on the type, D and the alignment of rows, not on T or
// V: each kernel has one order of sums, so that a logit does not depend on which other rows and tokens there
// are.
void token_divergence_cuda(CudaKernel kernel, const TokenDivergence& args, CUstream_st* stream);

// The first stage: fills summaries [ceil(V / tile), T] and own_logit, and returns its tile. kMma is two
// files.
bool divergence_hopper_possible(const TokenDivergence& args);
int64_t divergence_mma(const TokenDivergence& args, CUstream_st* stream);
int64_t divergence_float32(const TokenDivergence& args, CUstream_st* stream);
int64_t divergence_hopper(const TokenDivergence& args, CUstream_st* stream);

}  // namespace dtm_fast
