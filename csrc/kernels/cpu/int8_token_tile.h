// What the token tiles of AVX-512 VNNI and AMX share. Included only by files compiled for at least AVX-512
// VNNI; everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

#include "avx512_vectors.h"
#include "int8_linear.h"

namespace dtm_fast {
namespace {

constexpr int64_t kVectorBytes = 64;
constexpr int64_t kLanes = kInt8TokenBlock;
constexpr int kCols = 16;  // weight rows that are finished together

// y values of a vector of sums: 16 tokens, one weight row.
inline __m512 dequantized(const Int8Linear& args, __m512 scales, int64_t n, const int32_t* acc) {
  const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(args.scale_w[n]));
  const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(acc)), scale);
  return args.bias == nullptr ? value : _mm512_add_ps(value, _mm512_set1_ps(args.bias[n]));
}

// Columns of y that fill a cache line.
constexpr int64_t line_cols(FloatType type) { return type == FloatType::kFloat32 ? 16 : 32; }

// y[m0 : m0 + rows, n0 : n0 + cols] from the sums acc [cols, rows]; rows <= 16, cols <= line_cols(type);
// scale_x belongs to row m0. Two neighbours of bfloat16 are joined before the transposition, so that one
// transposition gives whole lines in both types.
template <FloatType type>
void store_block(const Int8Linear& args, const float* scale_x, int64_t m0, int64_t rows, int64_t n0,
                 int64_t cols, const int32_t* acc, int64_t acc_stride) {
  const __m512 scales = _mm512_maskz_loadu_ps(first_lanes(rows), scale_x);
  const auto value = [&](int64_t j) { return dequantized(args, scales, n0 + j, acc + j * acc_stride); };
  __m512i r[16];
#pragma GCC unroll 16
  for (int64_t lane = 0; lane < 16; ++lane) {
    r[lane] = _mm512_setzero_si512();
    if (type == FloatType::kFloat32) {
      if (lane < cols) r[lane] = _mm512_castps_si512(value(lane));
    } else {
      if (2 * lane < cols) r[lane] = bfloat16_lanes(value(2 * lane));
      if (2 * lane + 1 < cols) {
        r[lane] = _mm512_or_si512(r[lane], _mm512_slli_epi32(bfloat16_lanes(value(2 * lane + 1)), 16));
      }
    }
  }
  transpose_16x16(r);
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    if (i >= rows) break;
    const int64_t first = (m0 + i) * args.N + n0;
    if (type == FloatType::kFloat32 && args.stream_y && cols == 16) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<float*>(args.y) + first), r[i]);
    } else if (type == FloatType::kFloat32) {
      _mm512_mask_storeu_epi32(static_cast<float*>(args.y) + first, first_lanes(cols), r[i]);
    } else {
      _mm512_mask_storeu_epi16(static_cast<uint16_t*>(args.y) + first, first_words(cols), r[i]);
    }
  }
}

}  // namespace
}  // namespace dtm_fast
