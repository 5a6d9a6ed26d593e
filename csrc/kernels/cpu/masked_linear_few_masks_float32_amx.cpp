// masked_linear in float32 for few rows of x under several masks, whose time is that of the products: 16
// weight rows are split into pieces once for as many masks as have a tile for their sums. The masks' products
// follow each other while the pieces of x stay in their tiles, so that only weights are loaded: half as many
// tiles as if the masks took turns with every product.
#include <cstring>

#include "few_rows_amx.h"
#include "float32_steps_amx.h"
#include "mask_words_avx512.h"
#include "masked_linear_float32_store.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStripRows = 16;
constexpr int64_t kStepPieces = kFloat32Pieces * kTileWords;  // of a strip under one mask

using MaskedStrip = Strip<float, kStripRows>;

// For each 32 of a mask row the bits of k and k + 16 side by side, as pairs_of has them.
DTM_FAST_INLINE __mmask32 paired(__mmask32 kept) {
  return _pdep_u32(kept, 0x55555555u) | _pdep_u32(kept >> 16, 0xaaaaaaaau);
}

// Rows j0 .. j1 - 1 of step [kMasks, kFloat32Pieces, 16, 32], which begins at k.
template <int kMasks, bool kWhole>
DTM_FAST_INLINE void copy_rows(const MaskedStrip& strip, int64_t k, int64_t j0, int64_t j1, uint16_t* step) {
  const int64_t depth = strip.K - k, ahead = strip.ahead(k);
  const __mmask32 there = kWhole ? ~__mmask32{0} : first_words(depth);
  // Locals, for all that the compiler knows the stores could change the strip.
  const int64_t weight_stride = strip.weight_stride, mask_stride = strip.mask_stride;
  const bool in_memory = strip.in_memory;
  const uint8_t* masks[kMasks];
#pragma GCC unroll 4
  for (int v = 0; v < kMasks; ++v) masks[v] = strip.mask + v * strip.variant_stride + k / 8;
  for (int64_t j = j0; j < j1; ++j) {
    const float* from = strip.weight + j * weight_stride + k;
    if (in_memory) {
      for (int64_t line = 0; line < kBfloat16Step; line += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(from + ahead + line), _MM_HINT_T1);
      }
    }
    const Float32Pieces row = load_weights(from, there);
    __m512i pairs[kFloat32Pieces];
#pragma GCC unroll 3
    for (int p = 0; p < kFloat32Pieces; ++p) pairs[p] = pairs_of(row, p, ~__mmask32{0});
#pragma GCC unroll 4
    for (int v = 0; v < kMasks; ++v) {
      const uint8_t* bits = masks[v] + j * mask_stride;
      const __mmask32 kept = paired(kWhole ? mask_bits(bits, 0) : mask_bits_to_end(bits, 0, depth));
#pragma GCC unroll 3
      for (int p = 0; p < kFloat32Pieces; ++p) {
        _mm512_store_si512(step + v * kStepPieces + p * kTileWords + j * kBfloat16Step,
                           _mm512_maskz_mov_epi16(kept, pairs[p]));
      }
    }
  }
}

DTM_FAST_INLINE void load_x(const StepOfGroup& x) {
  _tile_loadd(5, x.piece(0), x.row_bytes());
  _tile_loadd(6, x.piece(1), x.row_bytes());
  _tile_loadd(7, x.piece(2), x.row_bytes());
}

// The products of float32_pieces.h under one mask. A macro, for the intrinsics take literals only.
#define DTM_FAST_ADD_PRODUCTS(sums, weights)                \
  do {                                                      \
    const uint16_t* const pieces = weights;                 \
    _tile_loadd(4, pieces + 2 * kTileWords, kTileRowBytes); \
    _tile_dpbf16ps(sums, 4, 5);                             \
    _tile_loadd(4, pieces + kTileWords, kTileRowBytes);     \
    _tile_dpbf16ps(sums, 4, 5);                             \
    _tile_dpbf16ps(sums, 4, 6);                             \
    _tile_loadd(4, pieces, kTileRowBytes);                  \
    _tile_dpbf16ps(sums, 4, 6);                             \
    _tile_dpbf16ps(sums, 4, 5);                             \
    _tile_dpbf16ps(sums, 4, 7);                             \
  } while (false)

DTM_FAST_INLINE void add_products(int v, const uint16_t* step) {
  if (v == 0) DTM_FAST_ADD_PRODUCTS(0, step);
  if (v == 1) DTM_FAST_ADD_PRODUCTS(1, step + kStepPieces);
  if (v == 2) DTM_FAST_ADD_PRODUCTS(2, step + 2 * kStepPieces);
  if (v == 3) DTM_FAST_ADD_PRODUCTS(3, step + 3 * kStepPieces);
}

#undef DTM_FAST_ADD_PRODUCTS

// sums [kMasks, 16 weight rows, rows of x]
template <int kMasks>
DTM_FAST_INLINE void store_sums_of_rows(float* sums, int64_t rows) {
  const int64_t tile = kBfloat16Group * rows, row_bytes = 4 * rows;
  _tile_stored(0, sums, row_bytes);
  if (kMasks > 1) _tile_stored(1, sums + tile, row_bytes);
  if (kMasks > 2) _tile_stored(2, sums + 2 * tile, row_bytes);
  if (kMasks > 3) _tile_stored(3, sums + 3 * tile, row_bytes);
  finish_writes(sums);
}

struct alignas(64) Buffers {
  uint16_t steps[2][kMostTogether * kStepPieces];
  float all[kMostTogether * kTileSums], of_eight[kMostTogether * kTileSums], block[kMostTogether * kTileSums];
};

// buffers.all = the strip under its masks times x, packed in one group of x_rows rows. Tiles and vectors work
// side by side: the products of a mask, then some rows of the next step, which is copied meanwhile.
template <int kMasks>
void multiply_strip(const MaskedStrip& strip, const uint16_t* x, int64_t x_rows, Buffers& buffers) {
  const int64_t step_of_x = piece_group_size(kBfloat16Step, x_rows);
  const PieceBlocks blocks(strip.K);
  int64_t k0 = 0;  // of the block
  Pending pending;
  zero_sums();
  for (int64_t k = 0, turn = 0; k < strip.K + kBfloat16Step; k += kBfloat16Step, turn = 1 - turn) {
    const bool multiplies = k > 0, copies = k < strip.K, whole = k + kBfloat16Step <= strip.K;
    uint16_t* const filled = buffers.steps[turn];
    const uint16_t* const used = buffers.steps[1 - turn];
    if (multiplies) load_x({x + (k / kBfloat16Step - 1) * step_of_x, 0, x_rows});
#pragma GCC unroll 4
    for (int v = 0; v < kMasks; ++v) {
      const int64_t j0 = strip.rows * v / kMasks, j1 = strip.rows * (v + 1) / kMasks;
      if (multiplies) add_products(v, used);
      if (copies && whole) copy_rows<kMasks, true>(strip, k, j0, j1, filled);
      if (copies && !whole) copy_rows<kMasks, false>(strip, k, j0, j1, filled);
    }
    finish_writes(filled);
    // Only now, a step after they were stored: until then they are on their way to the cache.
    add(pending, 0, pending.count);
    pending = {};
    if (!multiplies || (copies && k < blocks.after(k0))) continue;
    const int64_t count = kMasks * kTileSums / kBfloat16Group * x_rows;
    const BlockSums sums = sums_of_block(blocks, k0, count, buffers.all, buffers.of_eight, buffers.block);
    store_sums_of_rows<kMasks>(sums.to, x_rows);
    zero_sums();
    pending = sums.then;
    k0 = blocks.after(k0);
  }
  add(pending, 0, pending.count);
}

using MultiplyStrip = void(const MaskedStrip& strip, const uint16_t* x, int64_t x_rows, Buffers& buffers);
constexpr MultiplyStrip* kMultiplyStrip[kMostTogether] = {multiply_strip<1>, multiply_strip<2>,
                                                          multiply_strip<3>, multiply_strip<4>};

}  // namespace

void masked_linear_few_masks_float32_amx(const MaskedLinear& args, const Float32Tile& tile,
                                         const uint16_t* packed_x) {
  const TilesInUse tiles(tile.rows, FifthTile::kTokens);
  const DenormalsAreZero denormals_are_zero;
  Buffers buffers;
  std::memset(&buffers, 0, sizeof buffers);  // rows that are not there must be finite
  alignas(64) float sums[kTileSums] = {};
  for (int64_t j = 0; j < tile.cols; j += kStripRows) {
    const int64_t n = tile.n0 + j, rows = smaller(kStripRows, tile.cols - j);
    for_each_pass(tile.variants, [&](int64_t v0, int64_t masks) {
      const MaskedStrip strip(args, n, rows, tile.v0 + v0, v0 == 0);
      kMultiplyStrip[masks - 1](strip, packed_x, tile.rows, buffers);
      for (int64_t v = 0; v < masks; ++v) {
        // As wide as they are stored: a tile sets its rows apart.
        _tile_loadd(0, buffers.all + v * kBfloat16Group * tile.rows, 4 * tile.rows);
        _tile_stored(0, sums, kTileRowBytes);
        finish_writes(sums);
        store_float32_block(args, tile.v0 + v0 + v, tile.m0, tile.rows, n, rows, sums, tile.marks);
      }
    });
  }
}

}  // namespace dtm_fast
