// masked_linear in bfloat16 for few rows of x, whose time is that of reading the weight and the masks: every
// step of 32 of K is masked into one small buffer, from which it is multiplied at once, and the sums stay in
// their tiles. While a block of 32 weight rows is multiplied, the next one is fetched row by row: memory is
// fastest when it is read in long runs, the tiles need 32 rows side by side.
#include "bfloat16_panel.h"
#include "masked_linear_bfloat16.h"
#include "masked_linear_store_amx.h"

namespace dtm_fast {
namespace {

// Two blocks of 32 rows, the present and the next, are to share the second-level cache with their masks.
constexpr int64_t kLongestRun = 4096;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kStepSize = kPanelRows * kBfloat16Step;
constexpr int64_t kTileSize = kBfloat16Group * kBfloat16Group;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Asks the second-level cache for the lines of a matrix, one row after the other.
class Ahead {
 public:
  Ahead(const void* first, int64_t row_bytes, int64_t stride, int64_t rows)
      : row_(static_cast<const char*>(first)), row_bytes_(row_bytes), stride_(stride), rows_(rows) {}

  void fetch(int64_t lines) {
    while (lines > 0 && rows_ > 0) {
      const int64_t count = smaller(lines, (row_bytes_ - position_ + kLineBytes - 1) / kLineBytes);
      const char* from = row_ + position_;
      for (int64_t i = 0; i < count; ++i) _mm_prefetch(from + i * kLineBytes, _MM_HINT_T1);
      lines -= count;
      position_ += count * kLineBytes;
      if (position_ < row_bytes_) continue;
      position_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const char* row_;
  int64_t row_bytes_, stride_, rows_;
  int64_t position_ = 0;
};

// Weight rows n .. n + rows - 1, rows <= 32, from k on; counted from the first column of the tile.
struct Block {
  Block(const MaskedLinear& args, const MaskedLinearTile& tile, int64_t n, int64_t k, int64_t most_depth)
      : weight(static_cast<const uint16_t*>(args.weight) + (tile.n0 + n) * args.weight_stride + k),
        mask(args.mask + tile.v0 * args.mask_variant_stride + (tile.n0 + n) * args.mask_row_stride + k / 8),
        rows(smaller(kPanelRows, tile.cols - n)),
        depth(smaller(most_depth, args.K - k)) {}

  const uint16_t* weight;
  const uint8_t* mask;  // of the tile's first variant
  int64_t rows, depth;
};

// step [kVariants, 32, 32] = 32 of K of the block's weights, masked; rows beyond the block stay as they are.
template <int kVariants>
void copy_step(const MaskedLinear& args, const uint16_t* weight, const uint8_t* mask, int64_t rows,
               uint16_t* step) {
  // Locals, for all that the compiler knows the stores could change args.
  const int64_t weight_stride = args.weight_stride;
  const int64_t mask_stride = args.mask_row_stride, variant_stride = args.mask_variant_stride;
#pragma GCC unroll 8
  for (int64_t j = 0; j < rows; ++j) {
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
void multiply_step(const uint16_t* step, const uint16_t* x, int64_t group_size) {
  finish_writes(step);
  _tile_loadd(6, x, kTileRowBytes);
  _tile_loadd(4, step, kTileRowBytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, step + kStepSize / 2, kTileRowBytes);
  _tile_dpbf16ps(1, 5, 6);
  if (kGroups == 2) {
    _tile_loadd(7, x + group_size, kTileRowBytes);
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

// sums [kVariants][kGroups][32][16] (+)= the block under variants v .. times x, where x is at the block's
// first step. Fetches the masks of the next block, and weight_lines of its weights with every step.
template <int kGroups, int kVariants>
void multiply_block(const MaskedLinear& args, const Block& block, const Block& next, int64_t v,
                    const uint16_t* x, bool first, int64_t weight_lines, Ahead& next_weights, uint16_t* step,
                    float* sums) {
  constexpr bool kFourTiles = kGroups * kVariants == 2;
  const int64_t group_size = bfloat16_group_size(args.K);
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
  const uint8_t* next_mask = next.mask + v * args.mask_variant_stride;
  const int64_t mask_bytes = (next.depth + 7) / 8;
  Ahead next_masks[2] = {
      {next_mask, mask_bytes, args.mask_row_stride, next.rows},
      {next_mask + args.mask_variant_stride, mask_bytes, args.mask_row_stride, next.rows},
  };
  constexpr int64_t kMaskLines = kPanelRows * kBfloat16Step / 8 / kLineBytes;
  int64_t k = 0;
  for (; k + kBfloat16Step <= block.depth; k += kBfloat16Step) {
    copy_step<kVariants>(args, block.weight + k, mask + k / 8, block.rows, step);
    next_weights.fetch(weight_lines);
    for (int64_t each = 0; each < kVariants; ++each) next_masks[each].fetch(kMaskLines);
    multiply_step<kGroups, kVariants>(step, x + k * kBfloat16Group, group_size);
  }
  if (k < block.depth) {
    copy_last_step<kVariants>(args, block.weight + k, mask + k / 8, block.rows, block.depth - k, step);
    multiply_step<kGroups, kVariants>(step, x + k * kBfloat16Group, group_size);
  }
  _tile_stored(0, sums, kTileRowBytes);
  _tile_stored(1, sums + kTileSize, kTileRowBytes);
  if (kFourTiles) _tile_stored(2, sums + 2 * kTileSize, kTileRowBytes);
  if (kFourTiles) _tile_stored(3, sums + 3 * kTileSize, kTileRowBytes);
}

}  // namespace

void masked_linear_few_amx(const MaskedLinear& args, const MaskedLinearTile& tile) {
  const TilesInUse tiles;
  alignas(64) uint16_t step[2 * kStepSize];
  const int64_t groups = (tile.rows + kBfloat16Group - 1) / kBfloat16Group;
  const int64_t most_depth = bfloat16_block_depth(args.K, kLongestRun);
  const int64_t together = groups == 1 ? 2 : 1;  // variants that share a reading of the weight
  const int64_t passes = (tile.variants + together - 1) / together;
  const int64_t weight_lines = (kPanelRows + passes - 1) / passes;
  for (int64_t n = 0; n < tile.cols; n += kPanelRows) {
    const int64_t cols = smaller(kPanelRows, tile.cols - n);
    if (cols < kPanelRows) std::memset(step, 0, sizeof step);
    for (int64_t k0 = 0; k0 == 0 || k0 < args.K; k0 += most_depth) {
      const bool last = k0 + most_depth >= args.K;
      const Block block(args, tile, n, k0, most_depth);
      const Block next(args, tile, last ? n + kPanelRows : n, last ? 0 : k0 + most_depth, most_depth);
      Ahead next_weights(next.weight, next.depth * 2, args.weight_stride * 2, next.rows);
      for (int64_t v = 0; v < tile.variants; v += together) {
        const bool two = groups == 1 && v + 1 < tile.variants;
        const auto multiply =
            groups == 2 ? multiply_block<2, 1> : (two ? multiply_block<1, 2> : multiply_block<1, 1>);
        multiply(args, block, next, v, tile.x + k0 * kBfloat16Group, k0 == 0, weight_lines, next_weights,
                 step, tile.sums + v * groups * kSumBlock);
      }
      if (last) break;
    }
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
