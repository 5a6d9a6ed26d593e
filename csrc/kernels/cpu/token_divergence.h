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
//   logits[t, v] = type(sum_d float32(hidden[t, d]) * float32(lm_head[v, d]))
//   mismatch[t]  = argmax_v logits[t, v] != reference[t]       (lowest v wins, NaN is the largest)
//   nll[t]       = log sum_v exp(logits[t, v]) - logits[t, reference[t]]     (NaN where a logit is NaN)
//
// The order of the sum over d is that of gemm_tile.h, or on AMX that of bfloat16_tiles.h for bfloat16, and
// for float32 that of float32_pieces.h, but that of gemm_tile.h for rows of hidden that row_marks.h tells.
// The vocabulary is cut into tiles of fixed size, which are merged in order, so that the result depends on
// neither the batch nor the threads. Working memory is O(T * V / tile), for at most 2048 rows at a time.
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

// Rounds logits to bfloat16 in place, as bfloat16_bits of store_float.h; count is a multiple of 16.
using RoundLogits = void(float* logits, int64_t count);
RoundLogits round_logits_avx2;
RoundLogits round_logits_avx512;

// The same on AMX for many rows at once, and from the product on: the logits never leave the cache.
constexpr int64_t kWideVocabularyTile = 1024;
constexpr int64_t kWideTileRows = 512;

struct WideTile {
  // Packed groups of rows: for bfloat16 as bfloat16_tiles.h has them, for float32 block of D by block, each
  // as float32_pieces.h has it.
  const uint16_t* hidden;
  const void* lm_head;  // of the type of the function
  int64_t lm_head_stride;
  const int64_t* reference;  // [rows]
  int64_t first_token;       // of lm_head
  int64_t rows, tokens, D;   // rows <= kWideTileRows, tokens <= kWideVocabularyTile
  float* max;                // [rows]
  float* sum_exp;            // [rows]
  // [rows], written where the reference is a token of this tile: its logit, and whether no token of the tile
  // before it has one as large.
  float* reference_logit;
  uint8_t* reference_leads;
  float* sums;      // kWideTileSums
  float* of_eight;  // as many for float32; nullptr if D is one eight of blocks
};

constexpr int64_t kWidePartTokens = 256;  // whose sums are held
constexpr int64_t kWideTileSums = kWideTileRows * kWidePartTokens;

using SummarizeWideTile = void(const WideTile& tile);
SummarizeWideTile summarize_bfloat16_tile_amx;
// max is NaN for rows that have a logit which is not finite: it may be another one, or only too large for a
// piece. To be called with D > 0.
SummarizeWideTile summarize_float32_tile_amx;

}  // namespace dtm_fast
