#include "avx512_vectors.h"
#include "float32_pieces_avx512.h"

namespace dtm_fast {

void pack_float32_group_amx(const float* x, int64_t x_stride, int64_t rows, int64_t K, uint16_t* packed,
                            int64_t group_rows) {
  constexpr int64_t kTile = kBfloat16Group * kBfloat16Step;
  const DenormalsAreZero denormals_are_zero;
  const __mmask16 lanes = first_lanes(group_rows);
  alignas(64) uint16_t buffer[kFloat32Pieces * kTile] = {};
  // One row is packed as it is.
  const int64_t piece = group_rows == 1 ? kBfloat16Step : kTile;
  for (int64_t k = 0; k < K; k += kBfloat16Step) {
    uint16_t* const in_rows = group_rows == 1 ? packed : buffer;
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = x + i * x_stride + k;
      Float32Pieces pieces;
      split_x(_mm512_maskz_loadu_ps(first_lanes(K - k), row), pieces.low);
      split_x(_mm512_maskz_loadu_ps(K - k > 16 ? first_lanes(K - k - 16) : 0, row + 16), pieces.high);
#pragma GCC unroll 3
      for (int p = 0; p < kFloat32Pieces; ++p) {
        _mm512_storeu_si512(in_rows + p * piece + i * kBfloat16Step, pairs_of(pieces, p, ~__mmask32{0}));
      }
    }
    for (int p = 0; p < kFloat32Pieces; ++p, packed += kBfloat16Step * group_rows) {
      if (group_rows == 1) continue;
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_load_si512(in_rows + p * kTile + i * kBfloat16Step);
      transpose_16x16(r);
#pragma GCC unroll 16
      for (int64_t pair = 0; pair < 16; ++pair) {
        _mm512_mask_storeu_epi32(packed + pair * 2 * group_rows, lanes, r[pair]);
      }
    }
  }
}

float largest_magnitude_amx(const float* row, int64_t K) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 16) {
    // A NaN as the first operand gives way to the second.
    largest = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(K - k), row + k)), largest);
  }
  return _mm512_reduce_max_ps(largest);
}

}  // namespace dtm_fast
