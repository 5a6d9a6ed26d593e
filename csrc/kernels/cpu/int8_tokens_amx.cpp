// int8_linear for many tokens on AMX: TDPBSSD multiplies a tile of 16 weight rows by a tile of 16 packed
// tokens, 64 of K at a time. 32 weight rows are copied, a block of K at a time, to a panel in the first-level
// cache: read where they lie, the 16 rows of a tile would often share one of its sets.
#include "amx_tiles.h"
#include "int8_token_tile.h"

namespace dtm_fast {
namespace {

constexpr int64_t kBlock = 2 * kTileRows;  // weight rows, and tokens, that are multiplied at a time
constexpr int64_t kStep = kTileRowBytes;   // of K in a tile
constexpr int64_t kBlockSteps = 9;
constexpr int64_t kPanelStep = 2 * kTileBytes;
constexpr int64_t kSumsBlock = kBlock * kBlock;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// panel [steps, 32, 64] = qweight[:count, k0 : k0 + 64 * steps], zero beyond count and K
void pack_panel(const int8_t* qweight, int64_t stride, int64_t count, int64_t k0, int64_t K, int64_t steps,
                int8_t* panel) {
  for (int64_t j = 0; j < kBlock; ++j) {
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k = k0 + s * kStep;
      const __mmask64 bytes = j < count ? first_bytes(K - k) : 0;
      const __m512i row = _mm512_maskz_loadu_epi8(bytes, qweight + j * stride + k);
      _mm512_store_si512(panel + s * kPanelStep + j * kStep, row);
    }
  }
}

// The weights of the next panel, that are to be in the second-level cache when it is packed.
struct Next {
  const int8_t* rows;
  int64_t stride;
  int64_t count;

  void prefetch(int64_t step) const {
    for (int64_t j = 0; j < count; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(rows + j * stride + step * kStep), _MM_HINT_T1);
    }
  }
};

// sums [2, 2, 16, 16] (+)= panel @ tokens over the steps: the halves of the panel, then of the tokens.
template <int kWeightTiles, int kTokenTiles>
void multiply_tiles(const int8_t* panel, const int8_t* tokens, int64_t block_size, int64_t steps, bool first,
                    const Next& next, int32_t* sums) {
  constexpr int64_t kTile = kTileRows * kTileRows;
  if (first) {
    _tile_zero(0);
    if (kTokenTiles == 2) _tile_zero(1);
    if (kWeightTiles == 2) _tile_zero(2);
    if (kWeightTiles == 2 && kTokenTiles == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kTileRowBytes);
    if (kTokenTiles == 2) _tile_loadd(1, sums + kTile, kTileRowBytes);
    if (kWeightTiles == 2) _tile_loadd(2, sums + 2 * kTile, kTileRowBytes);
    if (kWeightTiles == 2 && kTokenTiles == 2) _tile_loadd(3, sums + 3 * kTile, kTileRowBytes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    next.prefetch(s);
    _tile_loadd(4, panel + s * kPanelStep, kTileRowBytes);
    _tile_loadd(6, tokens + s * kTileBytes, kTileRowBytes);
    _tile_dpbssd(0, 4, 6);
    if (kTokenTiles == 2) {
      _tile_loadd(7, tokens + block_size + s * kTileBytes, kTileRowBytes);
      _tile_dpbssd(1, 4, 7);
    }
    if (kWeightTiles == 2) {
      _tile_loadd(5, panel + s * kPanelStep + kTileBytes, kTileRowBytes);
      _tile_dpbssd(2, 5, 6);
      if (kTokenTiles == 2) _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kTileRowBytes);
  if (kTokenTiles == 2) _tile_stored(1, sums + kTile, kTileRowBytes);
  if (kWeightTiles == 2) _tile_stored(2, sums + 2 * kTile, kTileRowBytes);
  if (kWeightTiles == 2 && kTokenTiles == 2) _tile_stored(3, sums + 3 * kTile, kTileRowBytes);
}

// One column block of 32 weight rows for all rows of the tile.
template <FloatType type>
void multiply_columns(const Int8Linear& args, const Int8Tokens& tokens, int64_t m0, int64_t rows, int64_t n0,
                      int64_t cols, int8_t* panel, int32_t* sums) {
  const int64_t block_size = int8_token_groups(args.K) * kVectorBytes;
  const int64_t all_steps = block_size / kTileBytes;
  const int8_t* qweight = args.qweight + n0 * args.qweight_stride;
  for (int64_t s0 = 0; s0 < all_steps || s0 == 0; s0 += kBlockSteps) {
    const int64_t steps = smaller(kBlockSteps, all_steps - s0);
    pack_panel(qweight, args.qweight_stride, cols, s0 * kStep, args.K, steps, panel);
    finish_writes(panel);
    const bool last = s0 + steps == all_steps;
    // Where K ends, the next 32 weight rows follow.
    const int8_t* next_rows = last ? qweight + kBlock * args.qweight_stride : qweight + (s0 + steps) * kStep;
    const int64_t next_count = last ? smaller(kBlock, args.N - n0 - kBlock) : cols;
    const int64_t share = (kBlock * kBlock + rows - 1) / rows;
    for (int64_t i = 0; i < rows; i += kBlock) {
      const int8_t* block = tokens.packed + (m0 + i) / kLanes * block_size + s0 * kTileBytes;
      int32_t* block_sums = sums + i / kBlock * kSumsBlock;
      const bool two_tokens = rows - i > kLanes, two_weights = cols > kTileRows;
      const auto multiply = two_weights ? (two_tokens ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                        : (two_tokens ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
      const int64_t first_row = i / kBlock * share;
      const Next next = {next_rows + first_row * args.qweight_stride, args.qweight_stride,
                         smaller(share, next_count - first_row)};
      multiply(panel, block, block_size, steps, s0 == 0, next, block_sums);
      if (!last) continue;
      for (int64_t t = i; t < rows && t < i + kBlock; t += kLanes) {
        for (int64_t j = 0; j < cols; j += kCols) {
          const int32_t* tile = block_sums + (2 * (j / kTileRows) + (t - i) / kLanes) * kTileRows * kTileRows;
          store_block<type>(args, tokens.scale + m0 + t, m0 + t, smaller(kLanes, rows - t), n0 + j,
                            smaller(kCols, cols - j), tile, kTileRows);
        }
      }
    }
  }
}

}  // namespace

void int8_token_tile_amx(const Int8Linear& args, const Int8Tokens& tokens, int64_t m0, int64_t rows,
                         int64_t n0, int64_t cols) {
  alignas(64) int8_t panel[kBlockSteps * kPanelStep];
  alignas(64) int32_t sums[kInt8TokenTileRows / kBlock * kSumsBlock];
  const TilesInUse tiles;
  for (int64_t j = 0; j < cols; j += kBlock) {
    const auto multiply = args.type == FloatType::kFloat32 ? multiply_columns<FloatType::kFloat32>
                                                           : multiply_columns<FloatType::kBfloat16>;
    multiply(args, tokens, m0, rows, n0 + j, smaller(kBlock, cols - j), panel, sums);
  }
}

}  // namespace dtm_fast
