// What token_divergence knows of 16 rows of hidden while the tokens of a tile pass by. The sums of a panel of
// 32 tokens come out of the tile registers as [token][row], so that a vector holds one logit of each row, and
// maxima and sums over tokens need no step across the lanes of a vector. Included only by files compiled for
// AMX; everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction set.
//
// Rows is the state of 16 rows, with
//
//   float max[16]            the largest logit; what it is before the first is up to Rows
//   int32_t reference[16]    position in the tile, negative outside
//   sum_of_row(i)            sum exp(logit - max), NaN if there was a NaN
//   rounded(logit)           as the op's result is defined
#pragma once

#include "avx512_vectors.h"
#include "token_divergence.h"

namespace dtm_fast {
namespace {

// The reference of a row is token j of the panel with these logits; rows is what is known of those before.
template <typename Rows>
void note_reference(const Rows& rows, const float* logits, int64_t row, int64_t j, float* logit,
                    uint8_t* leads) {
  const float own = Rows::rounded(logits[j * 16 + row]);
  const float sum = rows.sum_of_row(row);
  bool led = sum != sum || rows.max[row] >= own;
  for (int64_t i = 0; i < j; ++i) {
    const float other = Rows::rounded(logits[i * 16 + row]);
    led = led || other != other || other >= own;
  }
  *logit = own;
  *leads = !led;
}

// Of the panel of tokens j0 .. j0 + tokens - 1, before its logits are added to those of the rows.
template <typename Rows>
void note_references(const WideTile& tile, int64_t j0, int64_t tokens, int64_t first_row, const float* logits,
                     const Rows& rows) {
  const __m512i position =
      _mm512_sub_epi32(_mm512_load_si512(rows.reference), _mm512_set1_epi32(static_cast<int>(j0)));
  unsigned here = _mm512_cmplt_epu32_mask(position, _mm512_set1_epi32(static_cast<int>(tokens)));
  for (; here != 0; here &= here - 1) {
    const int64_t i = __builtin_ctz(here);
    note_reference(rows, logits, i, rows.reference[i] - j0, tile.reference_logit + first_row + i,
                   tile.reference_leads + first_row + i);
  }
}

inline void find_references(const WideTile& tile, int64_t first_row, int32_t reference[16]) {
  for (int64_t i = 0; i < 16; ++i) {
    reference[i] = -1;
    if (first_row + i >= tile.rows) continue;
    const int64_t position = tile.reference[first_row + i] - tile.first_token;
    if (position >= 0 && position < tile.tokens) reference[i] = static_cast<int32_t>(position);
  }
}

}  // namespace
}  // namespace dtm_fast
