// int8_linear for many tokens: 16 tokens to a vector, the weight broadcast from where it lies.
#include <cstring>

#include "int8_products_avx512_vnni.h"
#include "int8_token_tile.h"

namespace dtm_fast {
namespace {

// Vectors of tokens in registers: 4 x 6 sums, 4 tokens, 1 weight, 1 offset: 30 of 32.
constexpr int64_t kVectors = 4;
constexpr int64_t kTokens = kVectors * kLanes;
// Weight rows of a block of sums: a multiple of those of every kernel, and of the bfloat16 in a cache line.
constexpr int64_t kSumCols = 96;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// vpdpbusd multiplies unsigned by signed bytes (Intel 64 and IA-32 Architectures Optimization Reference
// Manual, "Vector Neural Network Instructions"). So 128 is added to the weights, and every sum of a token
// starts at -128 * sum_k qx[k].
constexpr int32_t kOffset = static_cast<int32_t>(0x80808080);

// The four weights of group g of a row with their offset; beyond K they count nothing, for the tokens are 0
// there.
__m512i broadcast_group(const int8_t* row, int64_t g, int64_t K) {
  int32_t four = 0;
  const int64_t left = K - 4 * g;
  std::memcpy(&four, row + 4 * g, static_cast<size_t>(left < 4 ? left : 4));
  return _mm512_set1_epi32(four ^ kOffset);
}

// acc[j, v * 16 + lane] = start[v * 16 + lane] + sum_k (qweight[j, k] + 128) * tokens[v, k, lane]
template <int kRows, int kTokenVectors>
void multiply(const int8_t* tokens, const int32_t* start, int64_t block_size, const int8_t* qweight,
              int64_t qweight_stride, int64_t K, int32_t* acc) {
  __m512i sum[kRows][kTokenVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kTokenVectors; ++v) sum[j][v] = _mm512_loadu_si512(start + v * kLanes);
  }
  const __m512i offset = _mm512_set1_epi32(kOffset);
  const int64_t whole = K / 4;
  for (int64_t g = 0; g < whole; ++g) {
    __m512i x[kTokenVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTokenVectors; ++v) {
      x[v] = _mm512_load_si512(tokens + v * block_size + g * kVectorBytes);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j) {
      int32_t four;
      std::memcpy(&four, qweight + j * qweight_stride + 4 * g, sizeof four);
      const __m512i w = _mm512_xor_si512(_mm512_set1_epi32(four), offset);
#pragma GCC unroll 4
      for (int v = 0; v < kTokenVectors; ++v) sum[j][v] = add_products(sum[j][v], w, x[v]);
    }
  }
  if (K % 4 != 0) {
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j) {
      const __m512i w = broadcast_group(qweight + j * qweight_stride, whole, K);
#pragma GCC unroll 4
      for (int v = 0; v < kTokenVectors; ++v) {
        const __m512i x = _mm512_load_si512(tokens + v * block_size + whole * kVectorBytes);
        sum[j][v] = add_products(sum[j][v], w, x);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kTokenVectors; ++v) {
      _mm512_store_si512(acc + j * kTokens + v * kLanes, sum[j][v]);
    }
  }
}

// The part of y that a block of sums will become. Its lines are called into the cache while the sums are
// made: a row of y is a page or more from the next, so that nothing else foresees the stores.
struct Output {
  char* first;
  int64_t stride, rows, row_bytes;

  void prefetch(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end && i < rows; ++i) {
      for (int64_t b = 0; b < row_bytes; b += kVectorBytes) __builtin_prefetch(first + i * stride + b, 1);
    }
  }
};

template <int kTokenVectors>
void multiply_columns(const int8_t* tokens, const int32_t* start, int64_t block_size, const int8_t* qweight,
                      int64_t qweight_stride, int64_t cols, int64_t K, int32_t* acc, const Output& output) {
  // 16 to 24 sums hide the latency of vpdpbusd; more rows or more vectors would not fit into the registers.
  constexpr int kRows = kTokenVectors == 1 ? 16 : 24 / kTokenVectors;
  const int64_t share = (output.rows * kRows + cols - 1) / cols;
  int64_t j = 0;
  for (; j + kRows <= cols; j += kRows) {
    output.prefetch(j / kRows * share, (j / kRows + 1) * share);
    multiply<kRows, kTokenVectors>(tokens, start, block_size, qweight + j * qweight_stride, qweight_stride, K,
                                   acc + j * kTokens);
  }
  for (; j < cols; ++j) {
    multiply<1, kTokenVectors>(tokens, start, block_size, qweight + j * qweight_stride, qweight_stride, K,
                               acc + j * kTokens);
  }
}

// y[m0 : m0 + rows, n0 : n0 + cols] from the sums acc [cols, kTokens]
template <FloatType type>
void store_sums(const Int8Linear& args, const float* scale_x, int64_t m0, int64_t rows, int64_t n0,
                int64_t cols, const int32_t* acc) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < cols; j += line_cols(type)) {
      store_block<type>(args, scale_x + m0 + i, m0 + i, smaller(kLanes, rows - i), n0 + j,
                        smaller(line_cols(type), cols - j), acc + j * kTokens + i, kTokens);
    }
  }
}

}  // namespace

void int8_pack_tokens_avx512(const int8_t* qx, int64_t count, int64_t K, int8_t* packed, int32_t* start) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += kVectorBytes) {
    const __mmask64 bytes = first_bytes(K - k);
    __m512i r[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      r[i] = i < count ? _mm512_maskz_loadu_epi8(bytes, qx + i * K + k) : _mm512_setzero_si512();
    }
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      _mm512_store_si512(packed + (k / 4 + i) * kVectorBytes, r[i]);
      sum = add_products(sum, ones, r[i]);
    }
  }
  _mm512_storeu_si512(start, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128)));
}

void int8_token_tile_avx512_vnni(const Int8Linear& args, const Int8Tokens& tokens, int64_t m0, int64_t rows,
                                 int64_t n0, int64_t cols) {
  const int64_t block_size = int8_token_groups(args.K) * kVectorBytes;
  alignas(64) int32_t acc[kSumCols * kTokens];
  for (int64_t j0 = 0; j0 < cols; j0 += kSumCols) {
    const int64_t j_count = smaller(kSumCols, cols - j0);
    const int8_t* qweight = args.qweight + (n0 + j0) * args.qweight_stride;
    for (int64_t i0 = 0; i0 < rows; i0 += kTokens) {
      const int64_t i_count = smaller(kTokens, rows - i0);
      const int8_t* block = tokens.packed + (m0 + i0) / kLanes * block_size;
      const auto multiply = i_count > 3 * kLanes   ? multiply_columns<4>
                            : i_count > 2 * kLanes ? multiply_columns<3>
                            : i_count > kLanes     ? multiply_columns<2>
                                                   : multiply_columns<1>;
      const int64_t size = size_of(args.type);
      const Output output = {static_cast<char*>(args.y) + ((m0 + i0) * args.N + n0 + j0) * size,
                             args.N * size, i_count, j_count * size};
      multiply(block, tokens.start + m0 + i0, block_size, qweight, args.qweight_stride, j_count, args.K, acc,
               output);
      const auto store = args.type == FloatType::kFloat32 ? store_sums<FloatType::kFloat32>
                                                          : store_sums<FloatType::kBfloat16>;
      store(args, tokens.scale, m0 + i0, i_count, n0 + j0, j_count, acc);
    }
  }
}

}  // namespace dtm_fast
