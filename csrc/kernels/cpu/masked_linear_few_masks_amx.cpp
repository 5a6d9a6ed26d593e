// masked_linear in bfloat16 for few rows of x under several masks: every step of 32 of K of 16 weight rows is
// masked into one small buffer for as many masks as have a tile for their sums, and multiplied when the next
// one is copied.
#include <cstring>

#include "amx_tiles.h"
#include "avx512_vectors.h"
#include "few_rows_amx.h"
#include "mask_words_avx512.h"
#include "masked_linear_bfloat16.h"
#include "masked_linear_store_amx.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStripRows = 16;
constexpr int64_t kBlockRows = 2 * kStripRows;  // whose results fill a line of y
constexpr int64_t kTileWords = kStripRows * kBfloat16Step;
constexpr int64_t kTileSums = kStripRows * kBfloat16Group;
constexpr int64_t kBlockSums = kBlockRows * kBfloat16Group;

using MaskedStrip = Strip<uint16_t, kStripRows>;

// step [kMasks, 16, 32], which begins at k.
template <int kMasks, bool kWhole>
DTM_FAST_INLINE void copy_step(const MaskedStrip& strip, int64_t k, uint16_t* step) {
  const int64_t depth = strip.K - k, ahead = strip.ahead(k);
  const __mmask32 there = first_words(depth);
  // Locals, for all that the compiler knows the stores could change the strip.
  const int64_t rows = strip.rows, weight_stride = strip.weight_stride, mask_stride = strip.mask_stride;
  const bool in_memory = strip.in_memory;
  const uint8_t* masks[kMasks];
#pragma GCC unroll 4
  for (int v = 0; v < kMasks; ++v) {
    masks[v] = strip.mask + v * strip.variant_stride + k / 8;
    strip.fetch_next_mask(k, v);
  }
  const uint16_t* from = strip.weight + k;
#pragma GCC unroll 4
  for (int64_t j = 0; j < rows; ++j, from += weight_stride) {
    if (in_memory) _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T1);
    const __m512i row = kWhole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(there, from);
#pragma GCC unroll 4
    for (int v = 0; v < kMasks; ++v) {
      const uint8_t* bits = masks[v] + j * mask_stride;
      const __mmask32 kept = kWhole ? mask_bits(bits, 0) : mask_bits_to_end(bits, 0, depth);
      _mm512_store_si512(step + v * kTileWords + j * kBfloat16Step, _mm512_maskz_mov_epi16(kept, row));
    }
  }
}

// sums [kMasks, 16, 16], kBlockSums from mask to mask, = the strip under its masks times x, packed in one
// group of x_rows rows. buffer [2] steps.
template <int kMasks>
void multiply_strip(const MaskedStrip& strip, const uint16_t* x, int64_t x_rows, uint16_t* buffer,
                    float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0, turn = 0; k < strip.K + kBfloat16Step; k += kBfloat16Step, turn = 1 - turn) {
    uint16_t* const filled = buffer + turn * kMostTogether * kTileWords;
    const uint16_t* const used = buffer + (1 - turn) * kMostTogether * kTileWords;
    // The next step first: until it is copied, the one before has reached the cache, from which tiles are
    // loaded.
    if (k + kBfloat16Step <= strip.K) {
      copy_step<kMasks, true>(strip, k, filled);
    } else if (k < strip.K) {
      copy_step<kMasks, false>(strip, k, filled);
    }
    if (k > 0) {
      _tile_loadd(6, x + (k - kBfloat16Step) * x_rows, 4 * x_rows);
      _tile_loadd(4, used, kTileRowBytes);
      _tile_dpbf16ps(0, 4, 6);
      if (kMasks > 1) _tile_loadd(5, used + kTileWords, kTileRowBytes);
      if (kMasks > 1) _tile_dpbf16ps(1, 5, 6);
      if (kMasks > 2) _tile_loadd(4, used + 2 * kTileWords, kTileRowBytes);
      if (kMasks > 2) _tile_dpbf16ps(2, 4, 6);
      if (kMasks > 3) _tile_loadd(5, used + 3 * kTileWords, kTileRowBytes);
      if (kMasks > 3) _tile_dpbf16ps(3, 5, 6);
    }
    finish_writes(filled);
  }
  _tile_stored(0, sums, kTileRowBytes);
  if (kMasks > 1) _tile_stored(1, sums + kBlockSums, kTileRowBytes);
  if (kMasks > 2) _tile_stored(2, sums + 2 * kBlockSums, kTileRowBytes);
  if (kMasks > 3) _tile_stored(3, sums + 3 * kBlockSums, kTileRowBytes);
}

using MultiplyStrip = void(const MaskedStrip& strip, const uint16_t* x, int64_t x_rows, uint16_t* buffer,
                           float* sums);
constexpr MultiplyStrip* kMultiplyStrip[kMostTogether] = {multiply_strip<1>, multiply_strip<2>,
                                                          multiply_strip<3>, multiply_strip<4>};

}  // namespace

void masked_linear_few_masks_amx(const MaskedLinear& args, const MaskedLinearTile& tile) {
  const TilesInUse tiles(tile.rows);
  alignas(64) uint16_t buffer[2 * kMostTogether * kTileWords] = {};  // rows that are not there must be finite
  // Columns that are no rows of x stay as they are.
  std::memset(tile.sums, 0, static_cast<size_t>(tile.variants * kBlockSums) * sizeof(float));
  for (int64_t j = 0; j < tile.cols; j += kBlockRows) {
    const int64_t cols = smaller(kBlockRows, tile.cols - j);
    for (int64_t half = 0; half < cols; half += kStripRows) {
      for_each_pass(tile.variants, [&](int64_t v, int64_t masks) {
        const MaskedStrip strip(args, tile.n0 + j + half, smaller(kStripRows, cols - half), tile.v0 + v,
                                v == 0);
        kMultiplyStrip[masks - 1](strip, tile.x, tile.rows, buffer,
                                  tile.sums + v * kBlockSums + half * kBfloat16Group);
      });
    }
    finish_writes(tile.sums);
    for (int64_t v = 0; v < tile.variants; ++v) {
      store_block(args, tile.v0 + v, tile.m0, tile.rows, tile.n0 + j, cols, tile.sums + v * kBlockSums);
    }
  }
}

}  // namespace dtm_fast
