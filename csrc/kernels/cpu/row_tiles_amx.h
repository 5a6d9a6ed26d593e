// Products of many rows of x on AMX: rows lie in tiles as they are, and the weight is packed once for all of
// them, so that sums come out as rows of y lie. (Where there are fewer rows than weights it is the other way
// round: int8_tokens_amx.cpp, bfloat16_panel.h.) Included only by files compiled for AMX; everything is in an
// anonymous namespace, so that no copy can reach a file of a lower instruction set.
//
// A step is 64 bytes of K. Both sides are packed in blocks of 32 rows and all steps, two tiles to a step:
//
//   rows   : [steps][2][16 rows][64 bytes]
//   weight : [steps][2][16 lanes of K][16 weight rows][4 bytes], a lane being four int8 or two bfloat16
//
// The loops are those of Goto & van de Geijn ("Anatomy of High-Performance Matrix Multiplication", ACM TOMS
// 34(3), 2008): some steps of a block of weights stay in the first-level cache while the rows, from the
// second-level cache, pass by.
#pragma once

#include "amx_tiles.h"
#include "avx512_vectors.h"
#include "row_tiles.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStepBytes = 2 * kTileBytes;
// Steps of weights (20 KiB) and of rows that pass by share a first-level cache of 48 KiB.
constexpr int64_t kMostSteps = 10;
constexpr int64_t kTileSums = kTileRows * kTileRows;

// One step of the 16 weight rows of a tile. load(j): the 64 bytes of row j, zero beyond.
template <typename Load>
[[gnu::always_inline]] inline void pack_weight_tile(const Load& load, char* tile) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int64_t j = 0; j < 16; ++j) r[j] = load(j);
  transpose_16x16(r);
#pragma GCC unroll 16
  for (int64_t lane = 0; lane < 16; ++lane) _mm512_store_si512(tile + lane * kTileRowBytes, r[lane]);
}

// Where step s of row i of the packed rows is.
inline char* packed_row(char* packed, int64_t steps, int64_t i, int64_t s) {
  const int64_t tile = i % kTileBlock / kTileRows;
  return packed + (i / kTileBlock * steps + s) * kStepBytes + tile * kTileBytes +
         i % kTileRows * kTileRowBytes;
}

// 32 values as bfloat16, side by side, rounded as bfloat16_lanes does.
[[gnu::always_inline]] inline __m512i bfloat16_words(__m512 low, __m512 high) {
  constexpr int kNanOrDenormal = 0xa1;  // what the instruction treats in its own way
  const unsigned special =
      _mm512_fpclass_ps_mask(low, kNanOrDenormal) | _mm512_fpclass_ps_mask(high, kNanOrDenormal);
  if (__builtin_expect(special == 0, 1)) return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  const __m512i words[2] = {bfloat16_lanes(low), bfloat16_lanes(high)};
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(words[0])),
                            _mm512_cvtepi32_epi16(words[1]), 1);
}

struct Int8Product {
  using Sum = int32_t;
  static void add_00() { _tile_dpbssd(0, 4, 6); }
  static void add_01() { _tile_dpbssd(1, 4, 7); }
  static void add_10() { _tile_dpbssd(2, 5, 6); }
  static void add_11() { _tile_dpbssd(3, 5, 7); }
};

struct Bfloat16Product {
  using Sum = float;
  static void add_00() { _tile_dpbf16ps(0, 4, 6); }
  static void add_01() { _tile_dpbf16ps(1, 4, 7); }
  static void add_10() { _tile_dpbf16ps(2, 5, 6); }
  static void add_11() { _tile_dpbf16ps(3, 5, 7); }
};

// The sums of row i of a block with its first 16 weight rows; those with the others are kTileSums further.
template <typename Sum>
const Sum* sums_of_row(const Sum* sums, int64_t i) {
  return sums + i / kTileRows * 2 * kTileSums + i % kTileRows * kTileRows;
}

// sums [2, 2, 16, 16] (+)= rows times weights over the steps: the halves of the rows, then of the weights.
// Asks the second-level cache for `lines` of 64 bytes from next on with every step.
template <typename Product>
void multiply_block(const char* rows, const char* weight, int64_t steps, bool first, const char* next,
                    int64_t lines, typename Product::Sum* sums) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kTileRowBytes);
    _tile_loadd(1, sums + kTileSums, kTileRowBytes);
    _tile_loadd(2, sums + 2 * kTileSums, kTileRowBytes);
    _tile_loadd(3, sums + 3 * kTileSums, kTileRowBytes);
  }
  for (int64_t s = 0; s < steps; ++s, rows += kStepBytes, weight += kStepBytes) {
    for (int64_t i = 0; i < lines; ++i, next += kTileRowBytes) _mm_prefetch(next, _MM_HINT_T1);
    _tile_loadd(4, rows, kTileRowBytes);
    _tile_loadd(6, weight, kTileRowBytes);
    Product::add_00();
    _tile_loadd(7, weight + kTileBytes, kTileRowBytes);
    Product::add_01();
    _tile_loadd(5, rows + kTileBytes, kTileRowBytes);
    Product::add_10();
    Product::add_11();
  }
  _tile_stored(0, sums, kTileRowBytes);
  _tile_stored(1, sums + kTileSums, kTileRowBytes);
  _tile_stored(2, sums + 2 * kTileSums, kTileRowBytes);
  _tile_stored(3, sums + 3 * kTileSums, kTileRowBytes);
  finish_writes(sums);
}

// The packed rows times all of the packed weight [N, ...]; sums has room for a block of each of the row
// blocks. Calls finish(i, n, sums) for each block: rows from i on, weight rows from n on.
template <typename Product, typename Finish>
void multiply_rows(const char* packed_rows, int64_t row_blocks, const char* packed_weight, int64_t N,
                   int64_t steps, typename Product::Sum* sums, const Finish& finish) {
  const int64_t parts = (steps + kMostSteps - 1) / kMostSteps;
  const int64_t block_bytes = steps * kStepBytes;
  // All row blocks together ask for as many steps of the weight as they read.
  const int64_t lines = (kStepBytes / kTileRowBytes + row_blocks - 1) / row_blocks;
  for (int64_t n = 0; n < N; n += kTileBlock) {
    const char* const weight = packed_weight + n / kTileBlock * block_bytes;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t s0 = part * steps / parts, count = (part + 1) * steps / parts - s0;
      const char* next = weight + (s0 + count) * kStepBytes;  // also where that is of the next block
      for (int64_t b = 0; b < row_blocks; ++b, next += count * lines * kTileRowBytes) {
        typename Product::Sum* const own = sums + b * kBlockSums;
        multiply_block<Product>(packed_rows + b * block_bytes + s0 * kStepBytes, weight + s0 * kStepBytes,
                                count, part == 0, next, lines, own);
        if (part + 1 == parts) finish(b * kTileBlock, n, own);
      }
    }
  }
}

}  // namespace
}  // namespace dtm_fast
