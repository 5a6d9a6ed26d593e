// The kernel of masked_few_tokens.h for several variants and few tokens: a block of 16 weight rows is
// transposed once, without a mask, into the first-level cache. The masks are transposed in words of 32 bits,
// so that one test of a bit gives the lanes of a variant that count. Included only by files compiled for at
// least AVX-512; everything is in an anonymous namespace, so that no copy can reach a file of a lower
// instruction set.
#pragma once

#include "weight_ahead_avx512.h"

namespace dtm_fast {
namespace {

// Lanes of K that a vector of transposed mask bits is for, and the most such vectors of a block. The test is
// one of 32-bit lanes, or of 16-bit ones where a lane is a pair: then the bits of 8 pairs are there twice.
template <typename Lanes>
constexpr int64_t kBitsLanes = Lanes::kLaneK == 1 ? 32 : 8;
template <typename Lanes>
constexpr int64_t kBitsVectors = kGemmBlockK / kBitsLanes<Lanes>;
constexpr int64_t kBitsSize = 2 * kGemmBlockK;  // of a variant, in floats
constexpr int64_t kVariantsPanel = 16 * kGemmBlockK;

// bits [kBitsVectors, 16] = those of mask[j0 : j0 + 16, k0 : k0 + depth], zeros beyond
template <typename Lanes>
void transpose_bits(const GemmTile& tile, const uint8_t* mask, int64_t j0, int64_t k0, int64_t depth,
                    __m512i* bits) {
  const __mmask64 inside = first_bytes((depth + 7) / 8);
  const uint8_t* from = mask + j0 * tile.mask_row_stride + k0 / 8;
  __m512i r[16];
#pragma GCC unroll 16
  for (int64_t j = 0; j < 16; ++j) {
    const bool there = j0 + j < tile.cols;
    r[j] = _mm512_maskz_loadu_epi8(there ? inside : 0, from + (there ? j * tile.mask_row_stride : 0));
  }
  transpose_16x16(r);
  if (Lanes::kLaneK == 1) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBitsVectors<FloatLanes>; ++i) _mm512_store_si512(bits + i, r[i]);
    return;
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i lower = _mm512_and_si512(r[i], _mm512_set1_epi32(0xffff));
    const __m512i higher = _mm512_srli_epi32(r[i], 16);
    _mm512_store_si512(bits + 2 * i, _mm512_or_si512(lower, _mm512_slli_epi32(r[i], 16)));
    _mm512_store_si512(bits + 2 * i + 1, _mm512_or_si512(higher, higher_of_pairs(r[i])));
  }
}

// Lane t of the panel where bit t of its vector is set; of a pair each half by itself.
template <typename Lanes>
DTM_FAST_INLINE __m512 kept_lanes(__m512i bits, int64_t t, __m512i weights) {
  if (Lanes::kLaneK == 1) {
    const __m512i bit = _mm512_set1_epi32(static_cast<int>(uint32_t{1} << t));
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(_mm512_test_epi32_mask(bits, bit), weights));
  }
  const __m512i bit = _mm512_set1_epi32(static_cast<int>(uint32_t{0x20001} << 2 * t));
  return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(_mm512_test_epi16_mask(bits, bit), weights));
}

// What is asked for during the product of a block, evenly: a line of the weight for every lane of K, and each
// variant's masks. Steps of 0: nothing.
struct AheadOfVariants {
  DTM_FAST_INLINE void weight(int64_t lane) const { fetch_line(weights + lane * weight_step, first_level); }
  DTM_FAST_INLINE void mask(int64_t v, int64_t k) const {
    fetch_line(masks + v * variant_step + k / 8 * mask_step, first_level);
  }

  const char *weights, *masks;
  int64_t weight_step, mask_step, variant_step;
  bool first_level;
};

// Adds the product of a block to c [variants, rows, 16] of kVariants neighbouring variants, or sets it to
// that product. bits: of the first variant.
template <typename Lanes, int kRows, int kVariants>
void multiply_variants(const GemmTile& tile, const float* x, const float* panel, const __m512i* bits,
                       const AheadOfVariants& ahead, int64_t lanes, bool first, __mmask16 cols, float* c) {
  __m512 sum[kVariants][kRows];
  DTM_FAST_UNROLL
  for (int v = 0; v < kVariants; ++v) {
    DTM_FAST_UNROLL
    for (int i = 0; i < kRows; ++i) sum[v][i] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < lanes; k += kBitsLanes<Lanes>, ++bits) {
    __m512i of[kVariants];
    DTM_FAST_UNROLL
    for (int v = 0; v < kVariants; ++v) {
      of[v] = _mm512_load_si512(bits + v * (kBitsSize / 16));
      ahead.mask(v, k * Lanes::kLaneK);
    }
    const int64_t count = lanes - k < kBitsLanes<Lanes> ? lanes - k : kBitsLanes<Lanes>;
    for (int64_t t = 0; t < count; ++t) {
      const __m512i weights = _mm512_load_si512(panel + (k + t) * 16);
      ahead.weight(k + t);
      DTM_FAST_UNROLL
      for (int v = 0; v < kVariants; ++v) {
        const __m512 kept = kept_lanes<Lanes>(of[v], t, weights);
        DTM_FAST_UNROLL
        for (int i = 0; i < kRows; ++i) {
          sum[v][i] = Lanes::add_product(sum[v][i], _mm512_set1_ps(x[i * kGemmBlockK + k + t]), kept);
        }
      }
    }
  }
  const __mmask16 old = first ? __mmask16{0} : cols;
  DTM_FAST_UNROLL
  for (int v = 0; v < kVariants; ++v) {
    DTM_FAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float* to = c + v * tile.c_variant_stride + i * tile.c_stride;
      _mm512_mask_storeu_ps(to, cols, _mm512_add_ps(_mm512_maskz_loadu_ps(old, to), sum[v][i]));
    }
  }
}

// Variants whose sums are kept in registers together.
constexpr int64_t kSums = 8;

// The variants from v on: as many at once as there are sums for, then half of that. The first ones ask for
// the weight.
template <typename Lanes, int kRows, int kVariants>
void multiply_all_variants(const GemmTile& tile, int64_t v, const float* x, const float* panel,
                           const __m512i* bits, AheadOfVariants ahead, int64_t lanes, bool first,
                           __mmask16 cols, float* c) {
  if constexpr (kRows * kVariants <= kSums) {
    for (; v + kVariants <= tile.variants; v += kVariants) {
      multiply_variants<Lanes, kRows, kVariants>(tile, x, panel, bits + v * (kBitsSize / 16), ahead, lanes,
                                                 first, cols, c + v * tile.c_variant_stride);
      ahead.weight_step = 0;
      ahead.masks += kVariants * ahead.variant_step;
    }
  }
  if constexpr (kVariants > 1) {
    multiply_all_variants<Lanes, kRows, kVariants / 2>(tile, v, x, panel, bits, ahead, lanes, first, cols, c);
  }
}

// 16 weight rows of all variants.
template <FloatType type, typename Lanes, int kRows>
void multiply_shared(const GemmTile& tile, const float* x, int64_t j0, Fetch fetch) {
  float* const panel = tile.scratch;
  __m512i* const bits = reinterpret_cast<__m512i*>(tile.scratch + kVariantsPanel);
  const SixteenRows w(tile, nullptr, j0, type);
  const bool runs = fetch != Fetch::kNextVectors;
  const bool next_rows = runs && j0 + 16 < tile.cols;
  const WeightAhead<type> next_vectors(tile, w, j0, true, Fetch::kNextVectors);
  const __mmask16 cols = first_lanes(tile.cols - j0);
  for (int64_t k0 = 0; k0 < tile.K; k0 += kBlockK<Lanes>) {
    const int64_t depth = block_depth<Lanes>(tile.K, k0);
    const auto lines = [&](int64_t k) {
      return runs ? LinesAhead{w.weight, 0, false} : next_vectors.lines(k0 + k);
    };
    for_each_vector<type>(w, k0, depth, lines, [&](int64_t k, __m512i r[16]) __attribute__((always_inline)) {
      store_lanes<type, Lanes>(r, panel + k / Lanes::kLaneK * 16, 16);
    });
    for (int64_t v = 0; v < tile.variants; ++v) {
      transpose_bits<Lanes>(tile, tile.mask + v * tile.mask_variant_stride, j0, k0, depth,
                            bits + v * (kBitsSize / 16));
    }
    constexpr int64_t kLaneBytes = size_of(type) * Lanes::kLaneK;
    AheadOfVariants ahead = {w.weight, reinterpret_cast<const char*>(tile.mask), 0, 0, 0, false};
    if (next_rows) {
      ahead = {w.weight + 16 * (w.weight_bytes + k0 * size_of(type)),
               reinterpret_cast<const char*>(tile.mask) + (j0 + 16) * tile.mask_row_stride + 16 * (k0 / 8),
               16 * kLaneBytes,
               16,
               tile.mask_variant_stride,
               fetch == Fetch::kRunsToFirstLevel};
    }
    const int64_t lanes = (depth + Lanes::kLaneK - 1) / Lanes::kLaneK;
    multiply_all_variants<Lanes, kRows, kSums>(tile, 0, x + k0 / Lanes::kLaneK * kRows, panel, bits, ahead,
                                               lanes, k0 == 0, cols, tile.c + j0);
  }
}

}  // namespace
}  // namespace dtm_fast
