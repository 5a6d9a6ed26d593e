// int8_linear for many tokens: 16 tokens to a vector, the weight broadcast from where it lies.
#include <cstring>

#include "int8_token_tile.h"

namespace dtm_fast {
namespace {

constexpr int kVectors = 3;  // vectors of tokens in registers: 8 x 3 sums, 3 tokens, 1 weight: 28 of 32
constexpr int64_t kAccStride = kVectors * kLanes;

// The four weights of group g of a row, 0 beyond K: what the tokens hold there then does not count.
__m512i broadcast_group(const int8_t* row, int64_t g, int64_t K) {
  int32_t four = 0;
  const int64_t left = K - 4 * g;
  std::memcpy(&four, row + 4 * g, static_cast<size_t>(left < 4 ? left : 4));
  return _mm512_set1_epi32(four);
}

// sum + the four products of unsigned bytes of x and signed bytes of w in each lane, in place. The intrinsic
// means the same, but GCC 12 copies every sum before and after it, and spills what then has no register.
__m512i add_products(__m512i sum, __m512i x, __m512i w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  return sum;
}

// acc[j, v * 16 + lane] = sum_k tokens[v, k, lane] * qweight[j, k], tokens offset by 128. vpdpbusd multiplies
// unsigned by signed bytes (Intel 64 and IA-32 Architectures Optimization Reference Manual, "Vector Neural
// Network Instructions").
template <int kRows, int kTokenVectors>
void multiply(const uint8_t* tokens, int64_t block_size, const int8_t* qweight, int64_t qweight_stride,
              int64_t K, int32_t* acc, int64_t acc_stride) {
  __m512i sum[kRows][kTokenVectors] = {};
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
      const __m512i w = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < kTokenVectors; ++v) sum[j][v] = add_products(sum[j][v], x[v], w);
    }
  }
  if (K % 4 != 0) {
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j) {
      const __m512i w = broadcast_group(qweight + j * qweight_stride, whole, K);
#pragma GCC unroll 4
      for (int v = 0; v < kTokenVectors; ++v) {
        const __m512i x = _mm512_load_si512(tokens + v * block_size + whole * kVectorBytes);
        sum[j][v] = add_products(sum[j][v], x, w);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kTokenVectors; ++v) {
      _mm512_storeu_si512(acc + j * acc_stride + v * kLanes, sum[j][v]);
    }
  }
}

template <int kTokenVectors>
void multiply_columns(const uint8_t* tokens, int64_t block_size, const int8_t* qweight,
                      int64_t qweight_stride, int64_t cols, int64_t K, int32_t* acc, int64_t acc_stride) {
  // With one vector of tokens, 16 weight rows are needed to hide the latency of vpdpbusd.
  constexpr int kRows = kTokenVectors == 1 ? 16 : 8;
  int64_t j = 0;
  for (; j + kRows <= cols; j += kRows) {
    multiply<kRows, kTokenVectors>(tokens, block_size, qweight + j * qweight_stride, qweight_stride, K,
                                   acc + j * acc_stride, acc_stride);
  }
  for (; j < cols; ++j) {
    multiply<1, kTokenVectors>(tokens, block_size, qweight + j * qweight_stride, qweight_stride, K,
                               acc + j * acc_stride, acc_stride);
  }
}

// 128 * sum_k row[k]: what the offset of the tokens adds to every sum of this weight row.
int32_t offset_part(const int8_t* row, int64_t K) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += kVectorBytes) {
    const __m512i w = _mm512_maskz_loadu_epi8(first_bytes(K - k), row + k);
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), w);
  }
  return _mm512_reduce_add_epi32(sum) * 128;
}

}  // namespace

void int8_pack_tokens_avx512(const int8_t* qx, int64_t count, int64_t K, bool offset, uint8_t* packed) {
  const __m512i added = _mm512_set1_epi8(offset ? -128 : 0);
  for (int64_t k = 0; k < K; k += kVectorBytes) {
    const __mmask64 bytes = first_bytes(K - k);
    __m512i r[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      r[i] = i < count ? _mm512_maskz_loadu_epi8(bytes, qx + i * K + k) : _mm512_setzero_si512();
      r[i] = _mm512_xor_si512(r[i], added);
    }
    transpose_16x16(r);
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(packed + (k / 4 + i) * kVectorBytes, r[i]);
  }
}

void int8_token_tile_avx512_vnni(const Int8Linear& args, const Int8Tokens& tokens, int64_t m0, int64_t rows,
                                 int64_t n0, int64_t cols) {
  const int64_t block_size = int8_token_groups(args.K) * kVectorBytes;
  alignas(64) int32_t acc[kCols * kAccStride];
  for (int64_t j0 = 0; j0 < cols; j0 += kCols) {
    const int64_t j_count = cols - j0 < kCols ? cols - j0 : kCols;
    const int8_t* qweight = args.qweight + (n0 + j0) * args.qweight_stride;
    int32_t offset[kCols];
    for (int64_t j = 0; j < j_count; ++j) offset[j] = offset_part(qweight + j * args.qweight_stride, args.K);
    for (int64_t i0 = 0; i0 < rows; i0 += kVectors * kLanes) {
      const uint8_t* block = tokens.packed + (m0 + i0) / kLanes * block_size;
      const int64_t vectors = (rows - i0 + kLanes - 1) / kLanes;
      if (vectors >= 3) {
        multiply_columns<3>(block, block_size, qweight, args.qweight_stride, j_count, args.K, acc,
                            kAccStride);
      } else if (vectors == 2) {
        multiply_columns<2>(block, block_size, qweight, args.qweight_stride, j_count, args.K, acc,
                            kAccStride);
      } else {
        multiply_columns<1>(block, block_size, qweight, args.qweight_stride, j_count, args.K, acc,
                            kAccStride);
      }
      for (int64_t v = 0; v < kVectors && i0 + v * kLanes < rows; ++v) {
        const int64_t i = i0 + v * kLanes;
        const int64_t count = rows - i < kLanes ? rows - i : kLanes;
        const auto store = args.type == FloatType::kFloat32 ? store_block<FloatType::kFloat32>
                                                            : store_block<FloatType::kBfloat16>;
        store(args, tokens.scale + m0 + i, m0 + i, count, n0 + j0, j_count, acc + v * kLanes, kAccStride,
              offset);
      }
    }
  }
}

}  // namespace dtm_fast
