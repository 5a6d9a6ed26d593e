// masked_linear in bfloat16 for few rows of x under several masks: every step of 32 of K of 16 weight rows is
// masked into one small buffer for as many masks as have a tile for their sums, and multiplied when the next
// one is copied.
#include "amx_tiles.h"
#include "avx512_vectors.h"
#include "bfloat16_tiles.h"
#include "mask_words_avx512.h"
#include "masked_linear_bfloat16.h"
#include "masked_linear_store_amx.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStripRows = 16;
constexpr int64_t kMostTogether = 4;
constexpr int64_t kTileWords = kStripRows * kBfloat16Step;
constexpr int64_t kTileSums = kStripRows * kBfloat16Group;
// How far ahead of its use each row of the weight is fetched: steps of K.
constexpr int64_t kStepsAhead = 3;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Weight rows, at most kStripRows, under some masks.
struct Strip {
  const uint16_t* weight;
  int64_t weight_stride;
  const uint8_t* mask;  // of the first row under the first mask
  int64_t mask_stride, variant_stride;
  int64_t rows, K;
  bool in_memory;  // or in a cache

  // Where a row ends, the first steps of the one that lies a strip further.
  int64_t ahead(int64_t k) const {
    constexpr int64_t kAhead = kStepsAhead * kBfloat16Step;
    return kAhead + (k + kAhead < K ? 0 : kStripRows * weight_stride - K);
  }
};

// step [kMasks, 16, 32], which begins at k. Fetches the masks of the next strip, which usually follow without
// gaps.
template <int kMasks, bool kWhole>
DTM_FAST_INLINE void copy_step(const Strip& strip, int64_t k, uint16_t* step) {
  const int64_t depth = strip.K - k, ahead = strip.ahead(k);
  const __mmask32 there = first_words(depth);
  // Locals, for all that the compiler knows the stores could change the strip.
  const int64_t rows = strip.rows, weight_stride = strip.weight_stride, mask_stride = strip.mask_stride;
  const bool in_memory = strip.in_memory;
  const uint8_t* masks[kMasks];
#pragma GCC unroll 4
  for (int v = 0; v < kMasks; ++v) {
    masks[v] = strip.mask + v * strip.variant_stride + k / 8;
    const uint8_t* next = masks[v] + kStripRows * mask_stride + (kStripRows - 1) * (k / 8);
    _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
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

// sums [kMasks, kSumBlock] = the strip under its masks times x, packed in one group of x_rows rows. buffer
// [2] steps.
template <int kMasks>
void multiply_strip(const Strip& strip, const uint16_t* x, int64_t x_rows, uint16_t* buffer, float* sums,
                    int64_t sums_of_mask) {
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
  if (kMasks > 1) _tile_stored(1, sums + sums_of_mask, kTileRowBytes);
  if (kMasks > 2) _tile_stored(2, sums + 2 * sums_of_mask, kTileRowBytes);
  if (kMasks > 3) _tile_stored(3, sums + 3 * sums_of_mask, kTileRowBytes);
}

}  // namespace

void masked_linear_few_masks_amx(const MaskedLinear& args, const MaskedLinearTile& tile) {
  constexpr int64_t kBlockRows = 2 * kStripRows;  // whose results fill a line of y
  const TilesInUse tiles(tile.rows);
  alignas(64) uint16_t buffer[2 * kMostTogether * kTileWords] = {};  // rows that are not there must be finite
  for (int64_t j = 0; j < tile.cols; j += kBlockRows) {
    const int64_t cols = smaller(kBlockRows, tile.cols - j);
    for (int64_t half = 0; half < cols; half += kStripRows) {
      const int64_t n = tile.n0 + j + half;
      for (int64_t v0 = 0, masks; v0 < tile.variants; v0 += masks) {
        const int64_t left = tile.variants - v0, passes = (left + kMostTogether - 1) / kMostTogether;
        masks = (left + passes - 1) / passes;
        const Strip strip = {
            static_cast<const uint16_t*>(args.weight) + n * args.weight_stride,
            args.weight_stride,
            args.mask + (tile.v0 + v0) * args.mask_variant_stride + n * args.mask_row_stride,
            args.mask_row_stride,
            args.mask_variant_stride,
            smaller(kStripRows, cols - half),
            args.K,
            v0 == 0,
        };
        const auto multiply = masks == 1   ? multiply_strip<1>
                              : masks == 2 ? multiply_strip<2>
                              : masks == 3 ? multiply_strip<3>
                                           : multiply_strip<4>;
        multiply(strip, tile.x, tile.rows, buffer,
                 tile.sums + v0 * 2 * kTileSums + half / kStripRows * kTileSums, 2 * kTileSums);
      }
    }
    finish_writes(tile.sums);
    for (int64_t v = 0; v < tile.variants; ++v) {
      store_block(args, tile.v0 + v, tile.m0, tile.rows, tile.n0 + j, cols, tile.sums + v * 2 * kTileSums);
    }
  }
}

}  // namespace dtm_fast
