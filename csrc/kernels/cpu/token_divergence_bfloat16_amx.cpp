// Product, rounding and reduction of a tile of logits in bfloat16.
#include "bfloat16_panel.h"
#include "exp_sum_amx.h"
#include "logit_rows_amx.h"

namespace dtm_fast {
namespace {

constexpr float kLargest = 0x1.fffffep127f;  // of all finite numbers
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

__m512 round_to_bfloat16(__m512 x) {
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The state of 16 rows. Rounding to bfloat16 in pairs leaves the even and the odd rows in two vectors, each
// with the rows of one token in its lower and those of the next in its upper half.
struct alignas(64) Bfloat16Rows {
  float max[16];  // the largest logit, rounded; NaN before the first. A NaN among the logits is only in the
                  // sums
  float even[16], odd[16];  // sum exp(logit - max)
  int32_t reference[16];

  static float rounded(float logit) { return _mm512_cvtss_f32(round_to_bfloat16(_mm512_set1_ps(logit))); }
  float sum_of_row(int64_t row) const {
    const float* sums = row % 2 == 0 ? even : odd;
    return sums[row / 2] + sums[row / 2 + 8];
  }
};

// What is taken off logits whose largest is max: finite, so that an infinite logit does not make a NaN.
__m512 shift_of(__m512 max) {
  return _mm512_min_ps(_mm512_max_ps(max, _mm512_set1_ps(-kLargest)), _mm512_set1_ps(kLargest));
}

__m512 even_rows(__m512 rows) {
  const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
  return _mm512_permutexvar_ps(index, rows);
}

__m512 odd_rows(__m512 rows) {
  const __m512i index = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
  return _mm512_permutexvar_ps(index, rows);
}

// Adds a panel's logits [32, 16] before rounding.
void add_logits(const float* logits, Bfloat16Rows& rows) {
  __m512 largest = _mm512_load_ps(logits);
  for (int64_t j = 1; j < kPanelRows; ++j) largest = _mm512_max_ps(largest, _mm512_load_ps(logits + j * 16));
  const __m512 before = _mm512_load_ps(rows.max);
  const __m512 max = _mm512_max_ps(before, round_to_bfloat16(largest));  // rounding keeps the order
  const __m512 shift = shift_of(max);
  const __m512 factor = exp_term(_mm512_sub_ps(shift_of(before), shift));
  const __m512 even_shift = even_rows(shift), odd_shift = odd_rows(shift);
  __m512 even = _mm512_mul_ps(_mm512_load_ps(rows.even), even_rows(factor));
  __m512 odd = _mm512_mul_ps(_mm512_load_ps(rows.odd), odd_rows(factor));
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 4
  for (int64_t j = 0; j < kPanelRows; j += 2) {
    const __m512i pairs =
        (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(logits + (j + 1) * 16), _mm512_load_ps(logits + j * 16));
    const __m512 even_logits = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd_logits = _mm512_castsi512_ps(_mm512_and_si512(pairs, high_half));
    even = _mm512_add_ps(even, exp_term(_mm512_sub_ps(even_logits, even_shift)));
    odd = _mm512_add_ps(odd, exp_term(_mm512_sub_ps(odd_logits, odd_shift)));
  }
  _mm512_store_ps(rows.max, max);
  _mm512_store_ps(rows.even, even);
  _mm512_store_ps(rows.odd, odd);
}

void start(const WideTile& tile, int64_t first_row, Bfloat16Rows& rows) {
  _mm512_store_ps(rows.max, _mm512_set1_ps(kNan));
  _mm512_store_ps(rows.even, _mm512_setzero_ps());
  _mm512_store_ps(rows.odd, _mm512_setzero_ps());
  find_references(tile, first_row, rows.reference);
}

// The logits of tokens j0 .. j0 + tokens - 1, tokens <= 32, and 16 rows are complete.
void finish_panel(const WideTile& tile, int64_t j0, int64_t tokens, int64_t first_row, float* logits,
                  Bfloat16Rows& rows) {
  for (int64_t j = tokens; j < kPanelRows; ++j) _mm512_store_ps(logits + j * 16, _mm512_set1_ps(-kInfinity));
  note_references(tile, j0, tokens, first_row, logits, rows);
  add_logits(logits, rows);
}

}  // namespace

void summarize_bfloat16_tile_amx(const WideTile& tile) {
  const TilesInUse tiles;
  alignas(64) uint16_t panel[kPanelRows * kPanelStride];
  Bfloat16Rows state[kWideTileRows / kBfloat16Group];
  const int64_t group_size = bfloat16_group_size(tile.D);
  const int64_t groups = (tile.rows + kBfloat16Group - 1) / kBfloat16Group;
  const int64_t most_depth = bfloat16_block_depth(tile.D, kLongestBlock);
  const bool one_block = tile.D <= most_depth;
  const WeightRows w = {
      static_cast<const uint16_t*>(tile.lm_head), tile.lm_head_stride, nullptr, 0, tile.tokens, tile.D};
  for (int64_t g = 0; g < groups; ++g) start(tile, g * kBfloat16Group, state[g]);
  for (int64_t part = 0; part < tile.tokens; part += kWidePartTokens) {
    const int64_t part_end = tile.tokens - part < kWidePartTokens ? tile.tokens : part + kWidePartTokens;
    for (int64_t k0 = 0; k0 == 0 || k0 < tile.D; k0 += most_depth) {
      const bool last_block = k0 + most_depth >= tile.D;
      const int64_t depth = last_block ? tile.D - k0 : most_depth;
      for (int64_t j0 = part; j0 < part_end; j0 += kPanelRows) {
        copy_panel(w, j0, k0, depth, j0 + kPanelRows, k0, panel);
        const int64_t tokens = part_end - j0 < kPanelRows ? part_end - j0 : kPanelRows;
        for (int64_t g = 0; g < groups; g += 2) {
          // With one block of K, every panel and group can use the same memory, which stays in the cache.
          float* sums = tile.sums + (one_block ? 0 : ((j0 - part) / kPanelRows * groups + g) * kSumBlock);
          const uint16_t* x = tile.hidden + g * group_size + k0 * kBfloat16Group;
          g + 1 < groups ? multiply_groups<2>(panel, depth, x, group_size, k0 == 0, sums)
                         : multiply_groups<1>(panel, depth, x, group_size, k0 == 0, sums);
          if (!last_block) continue;
          for (int64_t each = g; each < groups && each < g + 2; ++each) {
            finish_panel(tile, j0, tokens, each * kBfloat16Group, sums + (each - g) * kSumBlock, state[each]);
          }
        }
      }
      if (last_block) break;
    }
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Bfloat16Rows& rows = state[i / kBfloat16Group];
    const float sum = rows.sum_of_row(i % kBfloat16Group);
    tile.max[i] = sum != sum ? kNan : rows.max[i % kBfloat16Group];
    tile.sum_exp[i] = sum;
  }
}

}  // namespace dtm_fast
