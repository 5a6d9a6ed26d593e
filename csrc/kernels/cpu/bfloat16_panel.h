// The inner loops of bfloat16_tiles.h: a panel of 32 weight rows times packed rows of x. Included only by
// files compiled for AMX; everything is in an anonymous namespace, so that no copy can reach a file of a
// lower instruction set.
#pragma once

#include "amx_tiles.h"
#include "avx512_vectors.h"
#include "bfloat16_tiles.h"
#include "mask_words_avx512.h"

namespace dtm_fast {
namespace {

constexpr int64_t kPanelRows = 32;  // two tiles of weights
// K is cut into blocks, so that a panel (20 KiB) stays in the first-level cache while x passes by.
constexpr int64_t kLongestBlock = 320;
// An odd number of cache lines: the 16 lines of a tile then lie in 16 different cache sets.
constexpr int64_t kPanelStride = kLongestBlock + 32;
// The float32 sums of a panel and a group of x: [32 weight rows][16 rows of x].
constexpr int64_t kSumBlock = kPanelRows * kBfloat16Group;

// A matrix of weights, masked where mask is not nullptr (its rows are ceil(K / 8) bytes, lowest bit first).
struct WeightRows {
  const uint16_t* weight;
  int64_t weight_stride;
  const uint8_t* mask;
  int64_t mask_stride;
  int64_t rows, K;
};

// to[0 : depth] = from[0 : depth], masked by bits k0 .. of the mask row; zero up to the next step. Lanes that
// are masked out are never read, so what they hold does not count. Asks the cache for as much from next on.
template <bool kMasked>
inline void copy_row(const uint16_t* from, const uint8_t* mask_row, int64_t k0, int64_t depth, int64_t K,
                     const uint16_t* next, uint16_t* to) {
  int64_t k = 0;
  for (; k + kBfloat16Step <= depth; k += kBfloat16Step) {
    _mm_prefetch(reinterpret_cast<const char*>(next + k), _MM_HINT_T1);
    const __m512i values = kMasked ? _mm512_maskz_loadu_epi16(mask_bits(mask_row, k0 + k), from + k)
                                   : _mm512_loadu_si512(from + k);
    _mm512_store_si512(to + k, values);
  }
  if (k == depth) return;
  __mmask32 lanes = first_words(depth - k);
  if (kMasked) lanes &= mask_bits_to_end(mask_row, k0 + k, K);
  _mm512_store_si512(to + k, _mm512_maskz_loadu_epi16(lanes, from + k));
}

// panel [32, kPanelStride] = rows j0 .. of w, k0 .. k0 + depth - 1, masked; zero beyond. Asks the cache for
// rows j1 .. from k1 on.
inline void copy_panel(const WeightRows& w, int64_t j0, int64_t k0, int64_t depth, int64_t j1, int64_t k1,
                       uint16_t* panel) {
  for (int64_t j = 0; j < kPanelRows; ++j) {
    uint16_t* to = panel + j * kPanelStride;
    if (j0 + j >= w.rows) {
      for (int64_t k = 0; k < depth; k += kBfloat16Step) _mm512_store_si512(to + k, _mm512_setzero_si512());
      continue;
    }
    const uint16_t* from = w.weight + (j0 + j) * w.weight_stride + k0;
    const uint16_t* next = w.weight + (j1 + j < w.rows ? j1 + j : j0 + j) * w.weight_stride + k1;
    if (w.mask == nullptr) {
      copy_row<false>(from, nullptr, k0, depth, w.K, next, to);
    } else {
      copy_row<true>(from, w.mask + (j0 + j) * w.mask_stride, k0, depth, w.K, next, to);
    }
  }
}

// sums of kGroups neighbouring groups (+)= panel times x, where x is at the block's first step.
template <int kGroups>
void multiply_groups(const uint16_t* panel, int64_t depth, const uint16_t* x, int64_t group_size, bool first,
                     float* sums) {
  constexpr int64_t kRowBytes = 64;
  constexpr int64_t kTile = kBfloat16Group * kBfloat16Group;
  finish_writes(panel);
  if (first) {
    _tile_zero(0);
    _tile_zero(2);
    if (kGroups == 2) _tile_zero(1);
    if (kGroups == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kRowBytes);
    _tile_loadd(2, sums + kTile, kRowBytes);
    if (kGroups == 2) _tile_loadd(1, sums + kSumBlock, kRowBytes);
    if (kGroups == 2) _tile_loadd(3, sums + kSumBlock + kTile, kRowBytes);
  }
  for (int64_t k = 0; k < depth; k += kBfloat16Step) {
    _tile_loadd(4, panel + k, kPanelStride * 2);
    _tile_loadd(6, x + k * kBfloat16Group, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, panel + 16 * kPanelStride + k, kPanelStride * 2);
    _tile_dpbf16ps(2, 5, 6);
    if (kGroups == 2) {
      _tile_loadd(7, x + group_size + k * kBfloat16Group, kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(2, sums + kTile, kRowBytes);
  if (kGroups == 2) _tile_stored(1, sums + kSumBlock, kRowBytes);
  if (kGroups == 2) _tile_stored(3, sums + kSumBlock + kTile, kRowBytes);
}

}  // namespace
}  // namespace dtm_fast
