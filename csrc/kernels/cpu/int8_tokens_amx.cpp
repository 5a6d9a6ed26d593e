// int8_linear for many tokens on AMX: TDPBSSD multiplies a tile of 16 weight rows by a tile of 16 packed
// tokens, 64 of K at a time. With many tokens 32 weight rows are copied, a block of K at a time, to a panel
// in the first-level cache: where they lie, the 16 rows of a tile often share one of its sets, and are read
// out of the second-level cache again for every 32 tokens.
#include "amx_tiles.h"
#include "int8_token_tile.h"

namespace dtm_fast {
namespace {

constexpr int64_t kBlock = 2 * kTileRows;  // weight rows, and tokens, that are multiplied at a time
constexpr int64_t kStep = kTileRowBytes;   // of K in a tile
constexpr int64_t kBlockSteps = 10;
// So many tokens or fewer read the weights where they lie, and keep their sums in tiles for all of K.
constexpr int64_t kInPlaceRows = 256;
constexpr int64_t kPanelStep = 2 * kTileBytes;
// How far ahead of its use a row is fetched by as many tokens as are multiplied at a time.
constexpr int64_t kStepsAhead = 2;
constexpr int64_t kSumsBlock = kBlock * kBlock;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// panel [steps, 32, 64] = qweight[:count, k0 : k0 + 64 * steps], zero beyond count and K
void pack_panel(const int8_t* qweight, int64_t stride, int64_t count, int64_t k0, int64_t K, int64_t steps,
                int8_t* panel) {
  const int64_t whole = smaller(steps, (K - k0) / kStep);
  for (int64_t j = 0; j < kBlock; ++j) {
    const int8_t* row = qweight + j * stride + k0;
    int8_t* to = panel + j * kStep;
    const bool there = j < count;
    for (int64_t s = 0; there && s < whole; ++s) {
      _mm512_store_si512(to + s * kPanelStep, _mm512_loadu_si512(row + s * kStep));
    }
    for (int64_t s = there ? whole : 0; s < steps; ++s) {
      const __mmask64 bytes = there ? first_bytes(K - k0 - s * kStep) : 0;
      _mm512_store_si512(to + s * kPanelStep, _mm512_maskz_loadu_epi8(bytes, row + s * kStep));
    }
  }
}

// The weights that are to be in the second-level cache when their turn comes.
struct Next {
  const int8_t* rows;
  int64_t stride;
  int64_t count;
  // From this step on, other rows: so far from the first ones.
  int64_t turn = INT64_MAX, to_others = 0;

  void prefetch(int64_t step) const {
    const int8_t* first = rows + step * kStep + (step < turn ? 0 : to_others);
    const char* line = reinterpret_cast<const char*>(first);
    for (int64_t j = 0; j < count; ++j, line += stride) _mm_prefetch(line, _MM_HINT_T1);
  }
};

// Weights as tiles: 16 rows one stride apart, two tiles to a step.
struct Weights {
  const int8_t* first;
  int64_t row, tile, step;

  const int8_t* at(int64_t s) const { return first + s * step; }
};

// sums [2, 2, 16, 16] (+)= weights @ tokens over the steps: the halves of the weights, then of the tokens.
template <int kWeightTiles, int kTokenTiles>
void multiply_tiles(const Weights& weights, const int8_t* tokens, int64_t block_size, int64_t steps,
                    bool first, const Next& next, int32_t* sums) {
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
    _tile_loadd(4, weights.at(s), weights.row);
    _tile_loadd(6, tokens + s * kTileBytes, kTileRowBytes);
    _tile_dpbssd(0, 4, 6);
    if (kTokenTiles == 2) {
      _tile_loadd(7, tokens + block_size + s * kTileBytes, kTileRowBytes);
      _tile_dpbssd(1, 4, 7);
    }
    if (kWeightTiles == 2) {
      _tile_loadd(5, weights.at(s) + weights.tile, weights.row);
      _tile_dpbssd(2, 5, 6);
      if (kTokenTiles == 2) _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kTileRowBytes);
  if (kTokenTiles == 2) _tile_stored(1, sums + kTile, kTileRowBytes);
  if (kWeightTiles == 2) _tile_stored(2, sums + 2 * kTile, kTileRowBytes);
  if (kWeightTiles == 2 && kTokenTiles == 2) _tile_stored(3, sums + 3 * kTile, kTileRowBytes);
}

// 32 weight rows or fewer, from n0 on, for some tokens.
template <FloatType type>
struct Columns {
  const Int8Linear& args;
  const Int8Tokens& tokens;
  int64_t m0, rows, n0, cols;
  int8_t* panel;
  int32_t* sums;  // of all tokens

  const int64_t block_size = int8_token_groups(args.K) * kVectorBytes;
  const int64_t steps = block_size / kTileBytes;
  const int8_t* const qweight = args.qweight + n0 * args.qweight_stride;

  // The weights of some steps, copied.
  Weights packed(int64_t s0, int64_t count) const {
    pack_panel(qweight, args.qweight_stride, cols, s0 * kStep, args.K, count, panel);
    finish_writes(panel);
    return {panel, kTileRowBytes, kTileBytes, kPanelStep};
  }

  // A share of the weights that are multiplied after these: rows from `from` on, of which there are `count`.
  Next share(const int8_t* from, int64_t count, int64_t i) const {
    const int64_t each = (kBlock * kBlock + rows - 1) / rows, first_row = i / kBlock * each;
    return {from + first_row * args.qweight_stride, args.qweight_stride, smaller(each, count - first_row)};
  }
  // The same weights some steps further, which a machine that foresees 32 runs along the rows hardly needs to
  // be told; in the end the first steps of the next ones.
  Next next_steps(int64_t whole) const {
    return {qweight + kStepsAhead * kStep, args.qweight_stride, cols, whole - kStepsAhead,
            kBlock * args.qweight_stride - whole * kStep};
  }
  Next share_of_next_columns(int64_t i) const {
    return share(qweight + kBlock * args.qweight_stride, smaller(kBlock, args.N - n0 - kBlock), i);
  }

  int32_t* sums_of(int64_t i) const { return sums + i / kBlock * kSumsBlock; }

  // The sums of tokens i .. i + 31 over some steps.
  void multiply(const Weights& weights, int64_t i, int64_t s0, int64_t count, const Next& next) const {
    const int8_t* own = tokens.packed + (m0 + i) / kLanes * block_size + s0 * kTileBytes;
    const bool two_tokens = rows - i > kLanes, two_weights = cols > kTileRows;
    const auto run = two_weights ? (two_tokens ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                 : (two_tokens ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
    run(weights, own, block_size, count, s0 == 0, next, sums_of(i));
  }

  void store(int64_t i) const {
    for (int64_t t = i; t < rows && t < i + kBlock; t += kLanes) {
      for (int64_t j = 0; j < cols; j += kCols) {
        const int64_t tile = 2 * (j / kTileRows) + (t - i) / kLanes;
        store_block<type>(args, tokens.scale + m0 + t, m0 + t, smaller(kLanes, rows - t), n0 + j,
                          smaller(kCols, cols - j), sums_of(i) + tile * kTileRows * kTileRows, kTileRows);
      }
    }
  }

  void in_place() const {
    const int64_t whole = args.K / kStep;
    const Weights weights = {qweight, args.qweight_stride, kTileRows * args.qweight_stride, kStep};
    const Weights tail = packed(whole, steps - whole);
    for (int64_t i = 0; i < rows; i += kBlock) {
      const Next next = rows <= kBlock ? next_steps(whole) : share_of_next_columns(i);
      multiply(weights, i, 0, whole, next);
      if (whole < steps) multiply(tail, i, whole, steps - whole, next);
      store(i);
    }
  }

  // Some steps after the other, whose weights stay in the first-level cache.
  void by_panels() const {
    const int64_t parts = steps <= kBlockSteps ? 1 : (steps + kBlockSteps - 1) / kBlockSteps;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t s0 = part * steps / parts, end = (part + 1) * steps / parts;
      const Weights weights = packed(s0, end - s0);
      for (int64_t i = 0; i < rows; i += kBlock) {
        const Next next = end == steps ? share_of_next_columns(i) : share(qweight + end * kStep, cols, i);
        multiply(weights, i, s0, end - s0, next);
        if (end == steps) store(i);
      }
    }
  }
};

}  // namespace

template <FloatType type>
static void multiply_tile(const Int8Linear& args, const Int8Tokens& tokens, int64_t m0, int64_t rows,
                          int64_t n0, int64_t cols) {
  alignas(64) int8_t panel[kBlockSteps * kPanelStep];
  alignas(64) int32_t sums[kInt8TokenTileRows / kBlock * kSumsBlock];
  const TilesInUse tiles;
  for (int64_t j = 0; j < cols; j += kBlock) {
    const int64_t count = smaller(kBlock, cols - j);
    const Columns<type> columns = {args, tokens, m0, rows, n0 + j, count, panel, sums};
    count == kBlock&& rows <= kInPlaceRows ? columns.in_place() : columns.by_panels();
  }
  if (args.stream_y) _mm_sfence();
}

void int8_token_tile_amx(const Int8Linear& args, const Int8Tokens& tokens, int64_t m0, int64_t rows,
                         int64_t n0, int64_t cols) {
  const auto multiply = args.type == FloatType::kFloat32 ? multiply_tile<FloatType::kFloat32>
                                                         : multiply_tile<FloatType::kBfloat16>;
  multiply(args, tokens, m0, rows, n0, cols);
}

}  // namespace dtm_fast
