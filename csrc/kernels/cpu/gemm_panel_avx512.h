// The parts that matrix products in AVX-512 share: panels of 32 weight rows, transposed, and the
// register-blocked micro-kernel that multiplies them (Goto & van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication", ACM TOMS 34(3), 2008). Included only by files compiled for at least AVX-512;
// everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "avx512_vectors.h"
#include "gemm_tile.h"

// Loops over the rows of a micro-kernel are unrolled, or GCC keeps the sums in memory; not under
// AddressSanitizer, whose checks of every access would make them too long to compile.
#if defined(__SANITIZE_ADDRESS__)
#define DTM_FAST_UNROLL
#else
#define DTM_FAST_UNROLL _Pragma("GCC unroll 16")
#endif

namespace dtm_fast {
namespace {

constexpr int64_t kPanelCols = 32;  // two vectors of weight rows
constexpr int64_t kPanelSize = kPanelCols * kGemmBlockK;
constexpr int64_t kMaxRows = 12;  // 24 accumulators, 2 weight vectors, 1 broadcast: 27 of 32 registers

inline const char* element(const void* matrix, FloatType type, int64_t stride, int64_t row, int64_t k) {
  return static_cast<const char*>(matrix) + (row * stride + k) * size_of(type);
}

// What the 32 bits of a lane hold in packed x and panels: one k, widened, or two neighbours of bfloat16. What
// multiplying two lanes adds to a sum is the only step of a product that depends on it.
struct FloatLanes {
  static constexpr int64_t kLaneK = 1;
  static __m512 add_product(__m512 sum, __m512 x, __m512 w) { return _mm512_fmadd_ps(x, w, sum); }
  // 32 neighbours of K.
  static void store_32(float* to, __m512 low, __m512 high) {
    _mm512_storeu_ps(to, low);
    _mm512_storeu_ps(to + 16, high);
  }
};

// The k of a block: kGemmBlockK lanes.
template <typename Lanes>
constexpr int64_t kBlockK = kGemmBlockK * Lanes::kLaneK;

template <typename Lanes>
int64_t block_depth(int64_t K, int64_t k0) {
  return K - k0 < kBlockK<Lanes> ? K - k0 : kBlockK<Lanes>;
}

// out [rows, kGemmBlockK] = the lanes of x[i0 : i0 + rows, k0 : k0 + depth], and zeros up to the next
// multiple of 32 of depth
template <FloatType type, typename Lanes>
void pack_x(const GemmTile& tile, int64_t i0, int64_t rows, int64_t k0, int64_t depth, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const void* row = element(tile.x, type, tile.x_stride, i0 + i, k0);
    for (int64_t k = 0; k < depth; k += 32) {
      float* to = out + i * kGemmBlockK + k / Lanes::kLaneK;
      if (Lanes::kLaneK == 2) {
        const uint16_t* from = static_cast<const uint16_t*>(row) + k;
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(first_words(depth - k), from));
        continue;
      }
      _mm512_storeu_ps(to, load_16<type>(row, k, first_lanes(depth - k)));
      _mm512_storeu_ps(to + 16, load_16<type>(row, k + 16, depth - k > 16 ? first_lanes(depth - k - 16) : 0));
    }
  }
}

// Bits k .. k + 31 of a mask row of K bits, zeros behind its last byte; the row is not read beyond that.
inline uint32_t mask_bits(const uint8_t* mask_row, int64_t k, int64_t K) {
  uint32_t bits = 0;
  if (k + 32 <= K) {
    std::memcpy(&bits, mask_row + k / 8, sizeof bits);
  } else {
    for (int64_t b = 0; k + 8 * b < K; ++b) bits |= uint32_t{mask_row[k / 8 + b]} << (8 * b);
  }
  return bits;
}

// k that one vector of a weight row holds.
template <FloatType type>
constexpr int64_t kVectorK = 64 / size_of(type);

// Asks the second-level cache for what is packed next: blocks of rows far apart, which the machine does not
// foresee.
inline void fetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(row + at, _MM_HINT_T1);
}

// The next block of at most kMaxRows rows of x.
template <FloatType type>
void fetch_x(const GemmTile& tile, int64_t i0, int64_t k0, int64_t depth) {
  for (int64_t i = i0; i < tile.rows && i < i0 + kMaxRows; ++i) {
    fetch_row(element(tile.x, type, tile.x_stride, i, k0), depth * size_of(type));
  }
}

// Weight rows j0 .. j1 - 1 of the block of K at k0, if there is one.
template <FloatType type, typename Lanes>
void fetch_weight(const GemmTile& tile, int64_t j0, int64_t j1, int64_t k0) {
  if (k0 >= tile.K) return;
  const int64_t bytes = block_depth<Lanes>(tile.K, k0) * size_of(type);
  for (int64_t j = j0; j < j1; ++j) {
    fetch_row(element(tile.weight, type, tile.weight_stride, j, k0), bytes);
  }
}

// Sixteen weight rows of a tile, from j0 on.
struct SixteenRows {
  SixteenRows(const GemmTile& tile, const uint8_t* mask_of_row_0, int64_t j0, FloatType type)
      : weight(element(tile.weight, type, tile.weight_stride, j0, 0)),
        weight_bytes(tile.weight_stride * size_of(type)),
        mask(mask_of_row_0 == nullptr ? nullptr : mask_of_row_0 + j0 * tile.mask_row_stride),
        mask_bytes(tile.mask_row_stride),
        rows(tile.cols - j0 < 16 ? tile.cols - j0 : 16),
        K(tile.K) {}

  const char* weight;
  int64_t weight_bytes;  // from row to row
  const uint8_t* mask;   // nullptr: all of the weight counts
  int64_t mask_bytes;
  int64_t rows, K;
};

// Sixteen lines of memory to ask for, `step` bytes apart, up to a level of cache. What only prefetches must
// be inlined: GCC 12 takes such a function for one without effect and drops its calls.
template <_mm_hint kLevel = _MM_HINT_T1>
struct Lines {
  DTM_FAST_INLINE void fetch(int64_t i) const { _mm_prefetch(first + i * step, kLevel); }

  const char* first;
  int64_t step;
};

// A vector of row j, from k on, zero where the mask says so. Weights that are masked out are never read, so
// what they hold does not count. All of the vector is there.
template <FloatType type, bool kMasked>
DTM_FAST_INLINE __m512i load_row(const SixteenRows& w, int64_t j, int64_t k) {
  const char* from = w.weight + j * w.weight_bytes + k * size_of(type);
  const uint8_t* bits = w.mask + j * w.mask_bytes + k / 8;
  if (!kMasked) return _mm512_loadu_si512(from);
  if (type == FloatType::kFloat32) {
    uint16_t lanes;
    std::memcpy(&lanes, bits, sizeof lanes);
    return _mm512_maskz_loadu_epi32(lanes, from);
  }
  uint32_t lanes;
  std::memcpy(&lanes, bits, sizeof lanes);
  return _mm512_maskz_loadu_epi16(lanes, from);
}

// The same of what there is of a vector, zero beyond the tile and from `depth` on.
template <FloatType type>
inline __m512i load_part_of_row(const SixteenRows& w, int64_t j, int64_t k, int64_t depth) {
  if (j >= w.rows) return _mm512_setzero_si512();
  uint32_t lanes = first_words(depth);
  if (w.mask != nullptr) lanes &= mask_bits(w.mask + j * w.mask_bytes, k, w.K);
  const void* weights = w.weight + j * w.weight_bytes + k * size_of(type);
  return type == FloatType::kFloat32 ? _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), weights)
                                     : _mm512_maskz_loadu_epi16(lanes, weights);
}

// r[i] lane j = weight[j, k + i] (bfloat16: the pair at k + 2 * i), zero where the mask says so. Asks for 16
// lines of `next` ahead. All 16 rows are there, and all of the vector. Unrolled: a row's index known only
// while running would send r through memory.
template <FloatType type, bool kMasked, typename Next>
DTM_FAST_INLINE void load_whole_transposed(const SixteenRows& w, int64_t k, const Next& next, __m512i r[16]) {
#pragma GCC unroll 16
  for (int64_t j = 0; j < 16; ++j) {
    next.fetch(j);
    r[j] = load_row<type, kMasked>(w, j, k);
  }
  transpose_16x16(r);
}

// The same of what there is of a vector.
template <FloatType type, typename Next>
inline void load_part_transposed(const SixteenRows& w, int64_t k, int64_t depth, const Next& next,
                                 __m512i r[16]) {
  for (int64_t j = 0; j < 16; ++j) {
    if (j < w.rows) next.fetch(j);
    r[j] = load_part_of_row<type>(w, j, k, depth);
  }
  transpose_16x16(r);
}

// Calls run(i, r) for the vectors of weight[:, k0 : k0 + depth], transposed, r being the one at k0 + i. With
// the vector at i, the lines next(i) are asked for.
template <FloatType type, typename Next, typename Run>
DTM_FAST_INLINE void for_each_vector(const SixteenRows& w, int64_t k0, int64_t depth, const Next& next,
                                     const Run& run) {
  int64_t i = 0;
  if (w.rows == 16 && w.mask != nullptr) {
    for (; i + kVectorK<type> <= depth; i += kVectorK<type>) {
      __m512i r[16];
      load_whole_transposed<type, true>(w, k0 + i, next(i), r);
      run(i, r);
    }
  } else if (w.rows == 16) {
    for (; i + kVectorK<type> <= depth; i += kVectorK<type>) {
      __m512i r[16];
      load_whole_transposed<type, false>(w, k0 + i, next(i), r);
      run(i, r);
    }
  }
  for (; i < depth; i += kVectorK<type>) {
    __m512i r[16];
    load_part_transposed<type>(w, k0 + i, depth - i, next(i), r);
    run(i, r);
  }
}

// The lower and the higher of the pairs of bfloat16 in the lanes.
inline __m512i lower_of_pairs(__m512i pairs) { return _mm512_slli_epi32(pairs, 16); }
inline __m512i higher_of_pairs(__m512i pairs) {
  return _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

// to[i * stride] = the lanes of the i-th k of a transposed vector; stride is in floats.
template <FloatType type, typename Lanes>
DTM_FAST_INLINE void store_lanes(const __m512i r[16], float* to, int64_t stride) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    if (type == FloatType::kFloat32 || Lanes::kLaneK == 2) {
      _mm512_storeu_si512(to + i * stride, r[i]);
    } else {
      _mm512_storeu_si512(to + 2 * i * stride, lower_of_pairs(r[i]));
      _mm512_storeu_si512(to + (2 * i + 1) * stride, higher_of_pairs(r[i]));
    }
  }
}

// 16 columns of a panel: panel[k / kLaneK * kPanelCols + j] = the lane of weight[j0 + j, k0 + k] for k <
// depth, and zeros up to the next multiple of kVectorK.
template <FloatType type, typename Lanes>
void pack_16_columns(const GemmTile& tile, const uint8_t* mask, int64_t j0, int64_t k0, int64_t depth,
                     const char* next, float* panel) {
  const SixteenRows w(tile, mask, j0, type);
  const auto ahead = [&](int64_t k) { return Lines<>{next + k * size_of(type), w.weight_bytes}; };
  for_each_vector<type>(w, k0, depth, ahead, [&](int64_t k, __m512i r[16]) __attribute__((always_inline)) {
    store_lanes<type, Lanes>(r, panel + k / Lanes::kLaneK * kPanelCols, kPanelCols);
  });
}

// c[0 : kRows, 0 : cols] = (first ? 0 : c) + x[0 : kRows, :lanes] @ panel, where x has row stride
// kGemmBlockK.
template <typename Lanes, int kRows>
void multiply(const float* x, const float* panel, int64_t lanes, bool first, float* c, int64_t c_stride,
              int64_t cols) {
  __m512 sum[kRows][2];
  DTM_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    _mm_prefetch(reinterpret_cast<const char*>(c + i * c_stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(c + i * c_stride + cols - 1), _MM_HINT_T0);
  }
  for (int64_t k = 0; k < lanes; ++k) {
    const float* w = panel + k * kPanelCols;
    const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
    DTM_FAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512 value = _mm512_set1_ps(x[i * kGemmBlockK + k]);
      sum[i][0] = Lanes::add_product(sum[i][0], value, w0);
      sum[i][1] = Lanes::add_product(sum[i][1], value, w1);
    }
  }
  const __mmask16 lanes0 = first_lanes(cols);
  const __mmask16 lanes1 = cols > 16 ? first_lanes(cols - 16) : __mmask16{0};
  const __mmask16 old0 = first ? __mmask16{0} : lanes0, old1 = first ? __mmask16{0} : lanes1;
  DTM_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    float* row = c + i * c_stride;
    _mm512_mask_storeu_ps(row, lanes0, _mm512_add_ps(_mm512_maskz_loadu_ps(old0, row), sum[i][0]));
    _mm512_mask_storeu_ps(row + 16, lanes1, _mm512_add_ps(_mm512_maskz_loadu_ps(old1, row + 16), sum[i][1]));
  }
}

using Multiply = void(const float* x, const float* panel, int64_t lanes, bool first, float* c,
                      int64_t c_stride, int64_t cols);

// By the number of rows.
template <typename Lanes>
constexpr Multiply* kMultiply[kMaxRows + 1] = {nullptr,
                                               multiply<Lanes, 1>,
                                               multiply<Lanes, 2>,
                                               multiply<Lanes, 3>,
                                               multiply<Lanes, 4>,
                                               multiply<Lanes, 5>,
                                               multiply<Lanes, 6>,
                                               multiply<Lanes, 7>,
                                               multiply<Lanes, 8>,
                                               multiply<Lanes, 9>,
                                               multiply<Lanes, 10>,
                                               multiply<Lanes, 11>,
                                               multiply<Lanes, 12>};

// Calls run(first row, rows) for blocks of at most kMaxRows, as even as can be: a block of few rows leaves
// the multipliers waiting for each other.
template <typename Run>
void for_each_row_block(int64_t rows, const Run& run, int64_t most = kMaxRows) {
  const int64_t blocks = (rows + most - 1) / most;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t i = b * rows / blocks;
    run(i, (b + 1) * rows / blocks - i);
  }
}

inline void set_to_zero(const GemmTile& tile) {
  for (int64_t v = 0; v < tile.variants; ++v) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* row = tile.c + v * tile.c_variant_stride + i * tile.c_stride;
      for (int64_t j = 0; j < tile.cols; ++j) row[j] = 0.0f;
    }
  }
}

// One tile. The order of the loops: all panels of a block of K are packed first and stay in the second-level
// cache (384 KiB for 384 columns, or 48 columns and 8 variants). 12 rows of x, packed into the first-level
// cache, are then multiplied by one panel after the other, whose one long stream the machine prefetches by
// itself.
template <FloatType type, typename Lanes>
void multiply_tile(const GemmTile& tile) {
  float* const x = tile.scratch;
  float* const panels = tile.scratch + kMaxRows * kGemmBlockK;
  if (tile.K == 0) set_to_zero(tile);
  for (int64_t k0 = 0; k0 < tile.K; k0 += kBlockK<Lanes>) {
    const int64_t depth = block_depth<Lanes>(tile.K, k0);
    const int64_t lanes = (depth + Lanes::kLaneK - 1) / Lanes::kLaneK;
    float* panel = panels;
    for (int64_t v = 0; v < tile.variants; ++v) {
      const uint8_t* mask = tile.mask == nullptr ? nullptr : tile.mask + v * tile.mask_variant_stride;
      for (int64_t j0 = 0; j0 < tile.cols; j0 += kPanelCols, panel += kPanelSize) {
        for (int64_t half = 0; half < kPanelCols; half += 16) {
          const char* next = element(tile.weight, type, tile.weight_stride, j0 + half + 16, k0);
          pack_16_columns<type, Lanes>(tile, mask, j0 + half, k0, depth, next, panel + half);
        }
      }
    }
    for_each_row_block(tile.rows, [&](int64_t i0, int64_t rows) {
      pack_x<type, Lanes>(tile, i0, rows, k0, depth, x);
      fetch_x<type>(tile, i0 + rows, k0, depth);
      fetch_weight<type, Lanes>(tile, tile.cols * i0 / tile.rows, tile.cols * (i0 + rows) / tile.rows,
                                k0 + depth);
      const float* each = panels;
      for (int64_t v = 0; v < tile.variants; ++v) {
        float* c = tile.c + v * tile.c_variant_stride + i0 * tile.c_stride;
        for (int64_t j0 = 0; j0 < tile.cols; j0 += kPanelCols, each += kPanelSize) {
          const int64_t cols = tile.cols - j0 < kPanelCols ? tile.cols - j0 : kPanelCols;
          kMultiply<Lanes>[rows](x, each, lanes, k0 == 0, c + j0, tile.c_stride, cols);
        }
      }
    });
  }
}

}  // namespace
}  // namespace dtm_fast
