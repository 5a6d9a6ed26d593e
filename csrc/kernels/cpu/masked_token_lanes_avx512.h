// The kernel of masked_few_tokens.h whose lanes are 16 tokens: weights are broadcast one by one, so nothing
// is transposed, and the sums of 16 weight rows are all there is to keep in registers. Included only by files
// compiled for at least AVX-512; everything is in an anonymous namespace, so that no copy can reach a file of
// a lower instruction set.
#pragma once

#include "weight_ahead_avx512.h"

namespace dtm_fast {
namespace {

constexpr int64_t kTokens = 16;

// Vectors of float lanes that a vector of the weight makes: two of bfloat16 that is widened.
template <FloatType type, typename Lanes>
constexpr int64_t kParts = type == FloatType::kBfloat16 && Lanes::kLaneK == 1 ? 2 : 1;

// A vector of each of 16 weight rows, masked; of widened bfloat16 the lower ones of the pairs, then the
// higher.
template <FloatType type, typename Lanes>
struct alignas(64) MaskedVectors {
  DTM_FAST_INLINE void store(int64_t j, __m512i vector) {
    if (kParts<type, Lanes> == 1) {
      _mm512_store_si512(lanes[0][j], vector);
    } else {
      _mm512_store_si512(lanes[0][j], lower_of_pairs(vector));
      _mm512_store_si512(lanes[kParts<type, Lanes> - 1][j], higher_of_pairs(vector));
    }
  }

  // What there is of the vectors at k.
  void store_part(const SixteenRows& w, int64_t k) {
    for (int64_t j = 0; j < 16; ++j) store(j, load_part_of_row<type>(w, j, k, w.K - k));
  }

  float lanes[kParts<type, Lanes>][16][16];
};

// Adds the products of 16 lanes of each weight row to their sums, x being at the first of them. Meanwhile
// stores the vectors at `next_k`, if they are whole, and asks for lines ahead: among so many multiplications
// neither takes time.
template <FloatType type, typename Lanes, bool kWhole, typename Next>
DTM_FAST_INLINE void add_tokens(const MaskedVectors<type, Lanes>& vectors, const float* x,
                                const SixteenRows& w, int64_t next_k, MaskedVectors<type, Lanes>& next,
                                const Next& lines, __m512 sum[16]) {
  for (int64_t t = 0; t < 16; ++t) {
    lines.fetch(t);
    if (kWhole) next.store(t, load_row<type, true>(w, t, next_k));
    DTM_FAST_UNROLL
    for (int64_t p = 0; p < kParts<type, Lanes>; ++p) {
      const __m512 tokens = _mm512_loadu_ps(x + (t * kParts<type, Lanes> + p) * kTokens);
      DTM_FAST_UNROLL
      for (int64_t j = 0; j < 16; ++j) {
        sum[j] = Lanes::add_product(sum[j], tokens, _mm512_set1_ps(vectors.lanes[p][j][t]));
      }
    }
  }
}

// c[0 : rows, 0 : 16] = 16 weight rows of one variant times at most 16 tokens. next_rows: whether to ask for
// the rows after these.
template <FloatType type, typename Lanes>
void multiply_tokens(const GemmTile& tile, const float* x, int64_t j0, int64_t v, Fetch fetch, bool next_rows,
                     int64_t rows, float* c) {
  const SixteenRows w(tile, tile.mask + v * tile.mask_variant_stride, j0, type);
  const WeightAhead<type> ahead(tile, w, j0, next_rows, fetch);
  alignas(64) float total[16][kTokens] = {};
  MaskedVectors<type, Lanes> vectors[2];
  vectors[0].store_part(w, 0);
  int now = 0;
  for (int64_t k0 = 0; k0 < w.K; k0 += kBlockK<Lanes>) {
    const int64_t end = k0 + block_depth<Lanes>(w.K, k0);
    __m512 sum[16];
    for (int64_t j = 0; j < 16; ++j) sum[j] = _mm512_setzero_ps();
    for (int64_t k = k0; k < end; k += kVectorK<type>, now ^= 1) {
      const int64_t next_k = k + kVectorK<type>;
      const float* tokens = x + k / Lanes::kLaneK * kTokens;
      if (w.rows == 16 && next_k + kVectorK<type> <= w.K) {
        add_tokens<type, Lanes, true>(vectors[now], tokens, w, next_k, vectors[now ^ 1], ahead.lines(k), sum);
        continue;
      }
      add_tokens<type, Lanes, false>(vectors[now], tokens, w, next_k, vectors[now ^ 1], ahead.lines(k), sum);
      if (next_k < w.K) vectors[now ^ 1].store_part(w, next_k);
    }
    for (int64_t j = 0; j < 16; ++j) {
      _mm512_store_ps(total[j], _mm512_add_ps(_mm512_load_ps(total[j]), sum[j]));
    }
  }
  __m512i r[16];
#pragma GCC unroll 16
  for (int64_t j = 0; j < 16; ++j) r[j] = _mm512_load_si512(total[j]);
  transpose_16x16(r);
  const __mmask16 cols = first_lanes(tile.cols - j0);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTokens; ++i) {
    if (i < rows) _mm512_mask_storeu_ps(c + i * tile.c_stride, cols, _mm512_castsi512_ps(r[i]));
  }
}

// out [K, kTokens] = the lanes of x[0 : rows], rows <= 16, transposed
template <FloatType type, typename Lanes>
void transpose_tokens(const void* x, int64_t x_stride, int64_t rows, int64_t K, float* out) {
  GemmTile tile = {};
  tile.weight = x;
  tile.weight_stride = x_stride;
  tile.cols = rows;
  tile.K = K;
  const SixteenRows tokens(tile, nullptr, 0, type);
  const auto ahead = [&](int64_t) { return Lines<>{tokens.weight, 0}; };
  for_each_vector<type>(tokens, 0, K, ahead, [&](int64_t k, __m512i r[16]) __attribute__((always_inline)) {
    store_lanes<type, Lanes>(r, out + k / Lanes::kLaneK * kTokens, kTokens);
  });
}

}  // namespace
}  // namespace dtm_fast
