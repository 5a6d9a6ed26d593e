// The inner loops of float32 in pieces, see float32_pieces.h: steps of 32 of K, 32 weight rows times packed
// rows of x. Included only by files compiled for AMX; everything is in an anonymous namespace, so that no
// copy can reach a file of a lower instruction set.
#pragma once

#include "amx_tiles.h"
#include "avx512_vectors.h"
#include "float32_pieces_avx512.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStepRows = 32;  // weight rows of a step: two tiles of each piece
constexpr int64_t kTileWords = kBfloat16Group * kBfloat16Step;
constexpr int64_t kStepOfX = kFloat32Pieces * kTileWords;
constexpr int64_t kTileSums = kBfloat16Group * kBfloat16Group;
// The float32 sums of a step's weight rows and a group of x: [32 weight rows][16 rows of x].
constexpr int64_t kGroupSums = kStepRows * kBfloat16Group;

// 32 neighbours of K of a weight row, the first `there` of them.
DTM_FAST_INLINE Float32Pieces load_weights(const float* from, __mmask32 there) {
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from);
  return split_weights(low, _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + 16));
}

// Where the pieces of a step lie: the second 16 weight rows follow after `half` elements.
struct StepOfWeight {
  const uint16_t* weight;
  int64_t piece, half, row_bytes;
};

// A step of a group of x, and how long its rows are; the next group follows after `group` elements.
struct StepOfGroup {
  const uint16_t* x;
  int64_t group = 0;
  int64_t rows = kBfloat16Group;

  const uint16_t* piece(int p) const { return x + p * kBfloat16Step * rows; }
  int64_t row_bytes() const { return kTileRowBytes / kBfloat16Group * rows; }
};

// Product p of a step: tiles 0 and 1 += both halves of the weight rows @ x, tiles 2 and 3 the same with the
// next group of x. To be called for all p in turn: pieces that two products share stay in their tiles.
template <int kGroups>
DTM_FAST_INLINE void add_product(int p, const StepOfWeight& w, const StepOfGroup& x) {
  const bool new_weight = p == 0 || kProductWeight[p] != kProductWeight[p - 1];
  const bool new_x = p == 0 || kProductX[p] != kProductX[p - 1];
  const uint16_t* weight = w.weight + kProductWeight[p] * w.piece;
  const uint16_t* from = x.piece(kProductX[p]);
  if (new_x) _tile_loadd(6, from, x.row_bytes());
  if (new_weight) _tile_loadd(4, weight, w.row_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if (new_weight) _tile_loadd(5, weight + w.half, w.row_bytes);
  _tile_dpbf16ps(1, 5, 6);
  if (kGroups == 1) return;
  if (new_x) _tile_loadd(7, from + x.group, x.row_bytes());
  _tile_dpbf16ps(2, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

DTM_FAST_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// sums [kGroups][32][16] = tiles 0, 1, 2, 3
template <int kGroups>
DTM_FAST_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, kTileRowBytes);
  _tile_stored(1, sums + kTileSums, kTileRowBytes);
  if (kGroups == 2) _tile_stored(2, sums + 2 * kTileSums, kTileRowBytes);
  if (kGroups == 2) _tile_stored(3, sums + 3 * kTileSums, kTileRowBytes);
  finish_writes(sums);
}

// Sums of a block of K that are still to be added to others: to += of_eight + block, or without of_eight
// where that is nullptr.
struct Pending {
  const float* block = nullptr;
  const float* of_eight = nullptr;
  float* to = nullptr;
  int64_t count = 0;  // a multiple of 16; all arrays lie on lines of cache
};

inline void add(const Pending& pending, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; i += 16) {
    __m512 sum = _mm512_load_ps(pending.block + i);
    if (pending.of_eight != nullptr) sum = _mm512_add_ps(_mm512_load_ps(pending.of_eight + i), sum);
    _mm512_store_ps(pending.to + i, _mm512_add_ps(_mm512_load_ps(pending.to + i), sum));
  }
}

// Where the sums of a block are stored, and what is to be done then.
struct BlockSums {
  float* to;
  Pending then;
};

// For `count` sums, those of the first eight blocks and of all in `all`, those of later eights in of_eight.
// buffer is free until what is pending has been added.
inline BlockSums sums_of_block(const PieceBlocks& blocks, int64_t k0, int64_t count, float* all,
                               float* of_eight, float* buffer) {
  const bool first = blocks.is_of_first_eight(k0), starts = blocks.starts_eight(k0);
  const bool completes = !first && blocks.ends_eight(k0);
  float* const own = first ? all : of_eight;
  if (starts && !completes) return {own, {}};
  return {buffer, {buffer, completes && !starts ? of_eight : nullptr, completes ? all : own, count}};
}

}  // namespace
}  // namespace dtm_fast
