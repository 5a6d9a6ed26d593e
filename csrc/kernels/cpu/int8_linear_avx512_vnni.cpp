#include <immintrin.h>

#include "avx512_vectors.h"
#include "int8_linear.h"
#include "int8_products_avx512_vnni.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStep = 64;  // int8 elements of K per vector
// Five tokens or more: weight rows and elements of K that are gone through with all tokens, before the next.
// So much of 16 tokens (8 KiB) stays in the first-level cache, as do the weights of four rows (2 KiB).
constexpr int64_t kPanelRows = 32;
constexpr int64_t kPanelDepth = 512;
constexpr int64_t kMostTokens = 4;  // whose sums with four weight rows have a register each
// How far ahead rows are fetched that are read one after the other: bytes.
constexpr int64_t kAhead = 16 * 1024;

// Lane j of the result is the sum of all lanes of a_j.
__m128i sum_lanes(__m512i a0, __m512i a1, __m512i a2, __m512i a3) {
  const __m512i a01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a0, a1), _mm512_unpackhi_epi32(a0, a1));
  const __m512i a23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a2, a3), _mm512_unpackhi_epi32(a2, a3));
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi64(a01, a23), _mm512_unpackhi_epi64(a01, a23));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// 128 * sum_k qx[k]
int32_t offset_part(const int8_t* qx, int64_t K) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += kStep) {
    const __m512i x = _mm512_maskz_loadu_epi8(first_bytes(K - k), qx + k);
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), x);
  }
  return _mm512_reduce_add_epi32(sum) * 128;
}

// vpdpbusd multiplies unsigned by signed bytes, so the weight is offset by 128 and 128 * sum_k qx[i, k] is
// taken off the result (Intel 64 and IA-32 Architectures Optimization Reference Manual, "Vector Neural
// Network Instructions"). Bytes beyond K are 0 in x, so that the 128 they have in the weight does not count.
__m512i load_weight(const int8_t* qweight, __mmask64 bytes) {
  return _mm512_xor_si512(_mm512_maskz_loadu_epi8(bytes, qweight), _mm512_set1_epi8(-128));
}

// Into the second-level cache: the first one holds the tokens.
void fetch(const int8_t* qweight) { _mm_prefetch(reinterpret_cast<const char*>(qweight), _MM_HINT_T1); }

// acc[i * acc_stride] = sum_k qx[i, k] * row[k]. Rows are read one after the other: several at once, 4 KiB
// apart as they often are, come from memory a third slower.
//
// The loops over the block are unrolled by pragma: left to itself, GCC 12 unrolls them too late to keep the
// sums in registers, and stores all of them in every step.
template <int kTokens>
void dot_row(const int8_t* qx, int64_t qx_stride, const int8_t* row, const int8_t* row_ahead, int64_t K,
             const int32_t* token_part, int32_t* acc, int64_t acc_stride) {
  constexpr int kChains = kTokens == 1 ? 4 : 2;  // sums per token, which hide the latency of vpdpbusd
  __m512i sum[4][kChains] = {};
  int64_t k = 0;
  for (; k + kChains * kStep <= K; k += kChains * kStep) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const int64_t at = k + c * kStep;
      fetch(row_ahead + at);
      const __m512i w = load_weight(row + at, ~__mmask64{0});
#pragma GCC unroll 4
      for (int i = 0; i < kTokens; ++i) {
        sum[i][c] = add_products(sum[i][c], w, _mm512_loadu_si512(qx + i * qx_stride + at));
      }
    }
  }
  for (; k < K; k += kStep) {
    const __mmask64 bytes = first_bytes(K - k);
    const __m512i w = load_weight(row + k, bytes);
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) {
      sum[i][0] = add_products(sum[i][0], w, _mm512_maskz_loadu_epi8(bytes, qx + i * qx_stride + k));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c) sum[i][0] = _mm512_add_epi32(sum[i][0], sum[i][c]);
  }
  const __m128i offset_sum = sum_lanes(sum[0][0], sum[1][0], sum[2][0], sum[3][0]);
  const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(token_part));
  alignas(16) int32_t result[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(result), _mm_sub_epi32(offset_sum, part));
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) acc[i * acc_stride] = result[i];
}

template <int kTokens>
void dot_rows(const int8_t* qx, int64_t qx_stride, const int8_t* qweight, int64_t qweight_stride,
              int64_t cols, int64_t K, const int32_t* token_part, int32_t* acc, int64_t acc_stride) {
  const int64_t rows_ahead = K == 0 ? 0 : (kAhead + K - 1) / K;
  for (int64_t j = 0; j < cols; ++j) {
    const int8_t* row = qweight + j * qweight_stride;
    dot_row<kTokens>(qx, qx_stride, row, row + rows_ahead * qweight_stride, K, token_part, acc + j,
                     acc_stride);
  }
}

// What one call of dot_block does: acc[i, j] += sum_k qx[i, k] * qweight[j, k] for four weight rows.
struct DotBlock {
  const int8_t* qx;
  int64_t qx_stride;
  const int8_t* qweight;
  int64_t qweight_stride;
  int64_t K;
  const int8_t* ahead;  // the first of the weight rows to fetch meanwhile
  int32_t* acc;
  int64_t acc_stride;
};

// One vector of K: kTokens x 4 sums.
template <int kTokens>
inline __attribute__((always_inline)) void add_step(__m512i (&sum)[kTokens][4], const int8_t* qx,
                                                    int64_t qx_stride, const int8_t* qweight,
                                                    int64_t qweight_stride, __mmask64 bytes) {
  __m512i x[kTokens];
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) x[i] = _mm512_maskz_loadu_epi8(bytes, qx + i * qx_stride);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i w = load_weight(qweight + j * qweight_stride, bytes);
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) sum[i][j] = add_products(sum[i][j], w, x[i]);
  }
}

template <int kTokens, int kAhead>
void dot_block(const DotBlock& block) {
  const int8_t* const qx = block.qx;
  const int8_t* const qweight = block.qweight;
  const int8_t* const ahead = block.ahead;
  const int64_t qx_stride = block.qx_stride, qweight_stride = block.qweight_stride;
  const int64_t whole = block.K / kStep * kStep;
  __m512i sum[kTokens][4] = {};
  for (int64_t k = 0; k < whole; k += kStep) {
#pragma GCC unroll 4
    for (int r = 0; r < kAhead; ++r) fetch(ahead + r * qweight_stride + k);
    add_step<kTokens>(sum, qx + k, qx_stride, qweight + k, qweight_stride, ~__mmask64{0});
  }
  if (whole < block.K) {
    add_step<kTokens>(sum, qx + whole, qx_stride, qweight + whole, qweight_stride,
                      first_bytes(block.K - whole));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) {
    __m128i* acc = reinterpret_cast<__m128i*>(block.acc + i * block.acc_stride);
    const __m128i more = sum_lanes(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    _mm_storeu_si128(acc, _mm_add_epi32(_mm_loadu_si128(acc), more));
  }
}

using DotRows = void(const int8_t* qx, int64_t qx_stride, const int8_t* qweight, int64_t qweight_stride,
                     int64_t cols, int64_t K, const int32_t* token_part, int32_t* acc, int64_t acc_stride);
constexpr DotRows* kDotRows[] = {dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>};
using DotBlocks = void(const DotBlock& block);
constexpr DotBlocks* kDotBlocks[][3] = {{dot_block<1, 0>, dot_block<1, 1>, dot_block<1, 2>},
                                        {dot_block<2, 0>, dot_block<2, 1>, dot_block<2, 2>},
                                        {dot_block<3, 0>, dot_block<3, 1>, dot_block<3, 2>},
                                        {dot_block<4, 0>, dot_block<4, 1>, dot_block<4, 2>}};

// Five tokens or more and a multiple of four weight rows: the sums of all tokens with four weight rows at a
// time, which lie in the first-level cache, while memory is asked for the rows of the next panel, a little in
// every step. A burst of requests would wait for memory, and more tokens at a time would wait for the
// second-level cache.
void dot_panels(const int8_t* qx, int64_t qx_stride, int64_t rows, const int8_t* qweight,
                int64_t qweight_stride, int64_t cols, int64_t K, int32_t* acc, int64_t acc_stride) {
  const int64_t groups = (rows + kMostTokens - 1) / kMostTokens;
  for (int64_t n0 = 0; n0 < cols; n0 += kPanelRows) {
    const int64_t n1 = n0 + kPanelRows < cols ? n0 + kPanelRows : cols;
    for (int64_t k0 = 0; k0 < K; k0 += kPanelDepth) {
      const int64_t depth = K - k0 < kPanelDepth ? K - k0 : kPanelDepth;
      for (int64_t j = n0; j < n1; j += 4) {
        const int8_t* weight = qweight + j * qweight_stride + k0;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t i = rows * g / groups;
          const int64_t ahead = 4 * g / groups;
          kDotBlocks[rows * (g + 1) / groups - i - 1][4 * (g + 1) / groups - ahead](
              {qx + i * qx_stride + k0, qx_stride, weight, qweight_stride, depth,
               weight + (kPanelRows + ahead) * qweight_stride, acc + i * acc_stride + j, acc_stride});
        }
      }
    }
  }
}

}  // namespace

void int8_dot_tile_avx512_vnni(const int8_t* qx, int64_t qx_stride, int64_t rows, const int8_t* qweight,
                               int64_t qweight_stride, int64_t cols, int64_t K, int32_t* acc,
                               int64_t acc_stride) {
  const int64_t panel_cols = rows > kMostTokens ? cols / 4 * 4 : 0;
  for (int64_t i = 0; i < rows; i += kMostTokens) {
    const int64_t count = rows - i < kMostTokens ? rows - i : kMostTokens;
    int32_t token_part[kMostTokens] = {};
    for (int64_t t = 0; t < count; ++t) {
      token_part[t] = offset_part(qx + (i + t) * qx_stride, K);
      int32_t* sums = acc + (i + t) * acc_stride;
      for (int64_t j = 0; j < panel_cols; ++j) sums[j] = -token_part[t];
    }
    kDotRows[count - 1](qx + i * qx_stride, qx_stride, qweight + panel_cols * qweight_stride, qweight_stride,
                        cols - panel_cols, K, token_part, acc + i * acc_stride + panel_cols, acc_stride);
  }
  dot_panels(qx, qx_stride, rows, qweight, qweight_stride, panel_cols, K, acc, acc_stride);
}

}  // namespace dtm_fast
