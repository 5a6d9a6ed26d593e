// What the token tiles of AVX-512 VNNI and AMX share. Included only by files compiled for at least AVX-512
// VNNI; everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "avx512_vectors.h"
#include "int8_linear.h"

namespace dtm_fast {
namespace {

constexpr int64_t kVectorBytes = 64;
constexpr int64_t kLanes = kInt8TokenBlock;
constexpr int kCols = 16;  // weight rows that are finished together

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

// As bfloat16_bits of store_float.h, 16 at a time.
__m256i bfloat16_bits(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), nan, 0x7fc0);
  return _mm512_cvtepi32_epi16(high);
}

// y[m0 : m0 + rows, n0 : n0 + cols] from the sums acc [cols, rows]; rows <= 16, cols <= 16.
void store_block(const Int8Linear& args, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                 const int32_t* acc, int64_t acc_stride, const int32_t* offset) {
  const __m512 scale_x = _mm512_maskz_loadu_ps(first_lanes(rows), args.scale_x + m0);
  __m512i r[16];
#pragma GCC unroll 16
  for (int64_t j = 0; j < kCols; ++j) {
    r[j] = _mm512_setzero_si512();
    if (j >= cols) continue;
    const __m512i sum = _mm512_loadu_si512(acc + j * acc_stride);
    __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(offset[j])));
    value = _mm512_mul_ps(value, _mm512_mul_ps(scale_x, _mm512_set1_ps(args.scale_w[n0 + j])));
    if (args.bias != nullptr) value = _mm512_add_ps(value, _mm512_set1_ps(args.bias[n0 + j]));
    r[j] = _mm512_castps_si512(value);
  }
  transpose_16x16(r);
  const __mmask16 lanes = first_lanes(cols);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = (m0 + i) * args.N + n0;
    if (args.y_type == FloatType::kFloat32) {
      _mm512_mask_storeu_ps(static_cast<float*>(args.y) + first, lanes, _mm512_castsi512_ps(r[i]));
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.y) + first, lanes,
                               bfloat16_bits(_mm512_castsi512_ps(r[i])));
    }
  }
}

}  // namespace
}  // namespace dtm_fast
