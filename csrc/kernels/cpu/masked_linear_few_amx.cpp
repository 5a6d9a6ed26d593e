// masked_linear in bfloat16 for few rows of x, whose time is that of reading the weight and the masks: every
// step of 32 of K is masked into one small buffer, from which it is multiplied at once, and the sums stay in
// their tiles.
#include "bfloat16_panel.h"
#include "masked_linear_bfloat16.h"
#include "masked_linear_store_amx.h"

namespace dtm_fast {
namespace {

// Weights of 32 rows that are multiplied under one mask after the other stay in the second-level cache.
constexpr int64_t kLongestRun = 4096;
// How far ahead of its use each row of the weight is fetched: steps of K.
constexpr int64_t kStepsAhead = 3;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kStepSize = kPanelRows * kBfloat16Step;
constexpr int64_t kTileSize = kBfloat16Group * kBfloat16Group;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Weight rows n .. n + rows - 1, rows <= 32, counted from the first column of the tile, from k0 on.
struct Block {
  Block(const MaskedLinear& args, const MaskedLinearTile& tile, int64_t n, int64_t k, int64_t most_depth)
      : weight(static_cast<const uint16_t*>(args.weight) + (tile.n0 + n) * args.weight_stride + k),
        mask(args.mask + tile.v0 * args.mask_variant_stride + (tile.n0 + n) * args.mask_row_stride + k / 8),
        rows(smaller(kPanelRows, tile.cols - n)),
        k0(k),
        depth(smaller(most_depth, args.K - k)) {}

  const uint16_t* weight;
  const uint8_t* mask;  // of the tile's first variant
  int64_t rows, k0, depth;
};

// Packed x: its groups, the first step of a block.
struct Rows {
  const uint16_t* first;
  int64_t group_rows, group_size;

  const uint16_t* at(int64_t k) const { return first + k * group_rows; }
  int64_t row_bytes() const { return 4 * group_rows; }
};

// step [kVariants, 32, 32] = 32 of K of the block's weights, masked; rows beyond the block stay as they are.
// Fetches what lies `ahead` of each row if kFetch.
template <int kVariants, bool kFetch>
void copy_step(const MaskedLinear& args, const uint16_t* weight, int64_t ahead, const uint8_t* mask,
               int64_t rows, uint16_t* step) {
  // Locals, for all that the compiler knows the stores could change args.
  const int64_t weight_stride = args.weight_stride;
  const int64_t mask_stride = args.mask_row_stride, variant_stride = args.mask_variant_stride;
#pragma GCC unroll 8
  for (int64_t j = 0; j < rows; ++j) {
    if (kFetch) _mm_prefetch(reinterpret_cast<const char*>(weight + ahead), _MM_HINT_T1);
    const __m512i values = _mm512_loadu_si512(weight);
    const __m512i first = _mm512_maskz_mov_epi16(mask_bits(mask, 0), values);
    _mm512_store_si512(step + j * kBfloat16Step, first);
    if (kVariants == 2) {
      const __m512i second = _mm512_maskz_mov_epi16(mask_bits(mask + variant_stride, 0), values);
      _mm512_store_si512(step + kStepSize + j * kBfloat16Step, second);
    }
    weight += weight_stride;
    mask += mask_stride;
  }
}

// The same where only depth < 32 of K are left; zero beyond.
template <int kVariants>
void copy_last_step(const MaskedLinear& args, const uint16_t* weight, const uint8_t* mask, int64_t rows,
                    int64_t depth, uint16_t* step) {
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t v = 0; v < kVariants; ++v) {
      const uint8_t* mask_row = mask + v * args.mask_variant_stride + j * args.mask_row_stride;
      const __mmask32 kept = first_words(depth) & mask_bits_to_end(mask_row, 0, depth);
      const __m512i values = _mm512_maskz_loadu_epi16(kept, weight + j * args.weight_stride);
      _mm512_store_si512(step + v * kStepSize + j * kBfloat16Step, values);
    }
  }
}

// Tiles 0-3 hold the sums [kVariants][kGroups][2 halves of the weight rows]; one of both numbers is 1.
template <int kGroups, int kVariants>
void multiply_step(const uint16_t* step, const Rows& x, int64_t k) {
  finish_writes(step);
  _tile_loadd(6, x.at(k), x.row_bytes());
  _tile_loadd(4, step, kTileRowBytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, step + kStepSize / 2, kTileRowBytes);
  _tile_dpbf16ps(1, 5, 6);
  if (kGroups == 2) {
    _tile_loadd(7, x.at(k) + x.group_size, x.row_bytes());
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  if (kVariants == 2) {
    _tile_loadd(4, step + kStepSize, kTileRowBytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, step + kStepSize + kStepSize / 2, kTileRowBytes);
    _tile_dpbf16ps(3, 5, 6);
  }
  finish_writes(step);  // and the compiler must not let the next step write before these loads
}

// sums [kVariants][kGroups][32][16] (+)= the block under variants v .. times x. Fetches weights if kFetch,
// and the masks of the next 32 rows, which usually follow without gaps.
template <int kGroups, int kVariants, bool kFetch>
void multiply_block(const MaskedLinear& args, const Block& block, int64_t v, const Rows& x, uint16_t* step,
                    float* sums) {
  constexpr bool kFourTiles = kGroups * kVariants == 2;
  const bool first = block.k0 == 0;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (kFourTiles) _tile_zero(2);
    if (kFourTiles) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kTileRowBytes);
    _tile_loadd(1, sums + kTileSize, kTileRowBytes);
    if (kFourTiles) _tile_loadd(2, sums + 2 * kTileSize, kTileRowBytes);
    if (kFourTiles) _tile_loadd(3, sums + 3 * kTileSize, kTileRowBytes);
  }
  const uint8_t* mask = block.mask + v * args.mask_variant_stride;
  // From where the share of this block begins.
  const uint8_t* next_masks = mask + kPanelRows * args.mask_row_stride + (kPanelRows - 1) * (block.k0 / 8);
  int64_t k = 0;
  for (; k + kBfloat16Step <= block.depth; k += kBfloat16Step) {
    // Where a row ends, the first steps of the one 32 rows further.
    constexpr int64_t kAhead = kStepsAhead * kBfloat16Step;
    const bool ends = block.k0 + k + kAhead >= args.K;
    const int64_t ahead = kAhead + (ends ? kPanelRows * args.weight_stride - args.K : 0);
    copy_step<kVariants, kFetch>(args, block.weight + k, ahead, mask + k / 8, block.rows, step);
    for (int64_t each = 0; each < kVariants; ++each) {
      constexpr int64_t kMaskBytes = kPanelRows * kBfloat16Step / 8;
      const uint8_t* lines = next_masks + each * args.mask_variant_stride + k / kBfloat16Step * kMaskBytes;
      for (int64_t line = 0; line < kMaskBytes; line += kLineBytes) {
        _mm_prefetch(reinterpret_cast<const char*>(lines + line), _MM_HINT_T1);
      }
    }
    multiply_step<kGroups, kVariants>(step, x, k);
  }
  if (k < block.depth) {
    copy_last_step<kVariants>(args, block.weight + k, mask + k / 8, block.rows, block.depth - k, step);
    multiply_step<kGroups, kVariants>(step, x, k);
  }
  _tile_stored(0, sums, kTileRowBytes);
  _tile_stored(1, sums + kTileSize, kTileRowBytes);
  if (kFourTiles) _tile_stored(2, sums + 2 * kTileSize, kTileRowBytes);
  if (kFourTiles) _tile_stored(3, sums + 3 * kTileSize, kTileRowBytes);
}

template <bool kFetch>
auto choose(int64_t groups, bool two_variants) {
  if (groups == 2) return multiply_block<2, 1, kFetch>;
  return two_variants ? multiply_block<1, 2, kFetch> : multiply_block<1, 1, kFetch>;
}

}  // namespace

void masked_linear_few_amx(const MaskedLinear& args, const MaskedLinearTile& tile) {
  const TilesInUse tiles(tile.group_rows);
  alignas(64) uint16_t step[2 * kStepSize];
  const int64_t groups = (tile.rows + kBfloat16Group - 1) / kBfloat16Group;
  const int64_t most_depth = bfloat16_block_depth(args.K, kLongestRun);
  const int64_t together = groups == 1 ? 2 : 1;  // variants that share a reading of the weight
  // Columns of the sums that are no rows of x stay as they are.
  std::memset(tile.sums, 0, static_cast<size_t>(tile.variants * groups * kSumBlock) * sizeof(float));
  for (int64_t n = 0; n < tile.cols; n += kPanelRows) {
    const int64_t cols = smaller(kPanelRows, tile.cols - n);
    if (cols < kPanelRows) std::memset(step, 0, sizeof step);
    int64_t k0 = 0;
    do {
      const Block block(args, tile, n, k0, most_depth);
      const Rows x = {tile.x + k0 * tile.group_rows, tile.group_rows,
                      bfloat16_group_size(args.K, tile.group_rows)};
      for (int64_t v = 0; v < tile.variants; v += together) {
        const bool two = groups == 1 && v + 1 < tile.variants;
        const auto multiply = v == 0 ? choose<true>(groups, two) : choose<false>(groups, two);
        multiply(args, block, v, x, step, tile.sums + v * groups * kSumBlock);
      }
      k0 += most_depth;
    } while (k0 < args.K);
    for (int64_t v = 0; v < tile.variants; ++v) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t i = g * kBfloat16Group;
        store_block(args, tile.v0 + v, tile.m0 + i, smaller(kBfloat16Group, tile.rows - i), tile.n0 + n, cols,
                    tile.sums + (v * groups + g) * kSumBlock);
      }
    }
  }
}

}  // namespace dtm_fast
