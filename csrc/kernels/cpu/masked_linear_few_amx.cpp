// masked_linear in bfloat16 for few rows of x, whose time is that of reading the weight and the mask: every
// step of 32 of K is masked into one small buffer, from which it is multiplied at once. The sums stay in
// their tiles.
#include "bfloat16_panel.h"
#include "few_rows_amx.h"
#include "masked_linear_bfloat16.h"
#include "masked_linear_store_amx.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStepSize = kPanelRows * kBfloat16Step;
constexpr int64_t kTileSize = kBfloat16Group * kBfloat16Group;

using Rows = Strip<uint16_t, kPanelRows>;

// step [32, 32], which begins at k.
template <bool kWhole>
DTM_FAST_INLINE void copy_step(const Rows& w, int64_t k, uint16_t* step) {
  const int64_t depth = w.K - k, ahead = w.ahead(k);
  const uint16_t* from = w.weight + k;
  const uint8_t* mask = w.mask + k / 8;
  w.fetch_next_mask(k, 0);
  // Locals, for all that the compiler knows the stores could change w.
  const int64_t rows = w.rows, weight_stride = w.weight_stride, mask_stride = w.mask_stride;
  const bool in_memory = w.in_memory;
#pragma GCC unroll 8
  for (int64_t j = 0; j < rows; ++j, from += weight_stride, mask += mask_stride) {
    if (in_memory) _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T1);
    const __m512i row =
        kWhole ? _mm512_maskz_mov_epi16(mask_bits(mask, 0), _mm512_loadu_si512(from))
               : _mm512_maskz_loadu_epi16(first_words(depth) & mask_bits_to_end(mask, 0, depth), from);
    _mm512_store_si512(step + j * kBfloat16Step, row);
  }
}

// sums [kGroups][32][16] = the rows times x, packed in groups of group_rows rows.
template <int kGroups>
void multiply_rows(const Rows& w, const uint16_t* x, int64_t group_rows, uint16_t* step, float* sums) {
  const int64_t group_size = bfloat16_group_size(w.K, group_rows), row_bytes = 4 * group_rows;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < w.K; k += kBfloat16Step) {
    k + kBfloat16Step <= w.K ? copy_step<true>(w, k, step) : copy_step<false>(w, k, step);
    finish_writes(step);
    _tile_loadd(6, x + k * group_rows, row_bytes);
    _tile_loadd(4, step, kTileRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, step + kStepSize / 2, kTileRowBytes);
    _tile_dpbf16ps(1, 5, 6);
    if (kGroups == 2) _tile_loadd(7, x + group_size + k * group_rows, row_bytes);
    if (kGroups == 2) _tile_dpbf16ps(2, 4, 7);
    if (kGroups == 2) _tile_dpbf16ps(3, 5, 7);
    finish_writes(step);  // and the compiler must not let the next step write before these loads
  }
  _tile_stored(0, sums, kTileRowBytes);
  _tile_stored(1, sums + kTileSize, kTileRowBytes);
  if (kGroups == 2) _tile_stored(2, sums + 2 * kTileSize, kTileRowBytes);
  if (kGroups == 2) _tile_stored(3, sums + 3 * kTileSize, kTileRowBytes);
  finish_writes(sums);
}

}  // namespace

void masked_linear_few_amx(const MaskedLinear& args, const MaskedLinearTile& tile) {
  const TilesInUse tiles(tile.group_rows);
  alignas(64) uint16_t step[kStepSize] = {};  // rows that are not there must be finite
  alignas(64) float sums[2 * kSumBlock] = {};
  const auto multiply = tile.rows > kBfloat16Group ? multiply_rows<2> : multiply_rows<1>;
  for (int64_t j = 0; j < tile.cols; j += kPanelRows) {
    const int64_t n = tile.n0 + j, cols = smaller(kPanelRows, tile.cols - j);
    for (int64_t v = tile.v0; v < tile.v0 + tile.variants; ++v) {
      const Rows rows(args, n, cols, v, v == tile.v0);
      multiply(rows, tile.x, tile.group_rows, step, sums);
      for (int64_t i = 0; i < tile.rows; i += kBfloat16Group) {
        store_block(args, v, tile.m0 + i, smaller(kBfloat16Group, tile.rows - i), n, cols,
                    sums + i / kBfloat16Group * kSumBlock);
      }
    }
  }
}

}  // namespace dtm_fast
