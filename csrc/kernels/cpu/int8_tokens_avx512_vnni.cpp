// int8_linear for many tokens: 16 tokens to a vector, the weight broadcast from where it lies.
#include "int8_token_tile.h"

namespace dtm_fast {
namespace {

constexpr int kVectors = 3;  // vectors of tokens in registers: 8 x 3 sums, 3 tokens, 1 weight: 28 of 32
constexpr int64_t kAccStride = kVectors * kLanes;

}  // namespace

void int8_pack_tokens_avx512(const int8_t* qx, int64_t M, int64_t K, int64_t block, uint8_t* tokens) {
  const __m512i kOffset = _mm512_set1_epi8(-128);
  const int64_t m0 = block * kLanes;
  for (int64_t k = 0; k < K; k += kVectorBytes) {
    const __mmask64 bytes = first_bytes(K - k);
    __m512i r[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      r[i] = m0 + i < M ? _mm512_maskz_loadu_epi8(bytes, qx + (m0 + i) * K + k) : _mm512_setzero_si512();
      r[i] = _mm512_xor_si512(r[i], kOffset);
    }
    transpose_16x16(r);
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(tokens + (k / 4 + i) * kVectorBytes, r[i]);
  }
}

void int8_token_tile_avx512_vnni(const Int8Linear& args, const uint8_t* tokens, int64_t m0, int64_t rows,
                                 int64_t n0, int64_t cols) {
  const int64_t block_size = int8_token_groups(args.K) * kVectorBytes;
  alignas(64) int32_t acc[kCols * kAccStride];
  for (int64_t j0 = 0; j0 < cols; j0 += kCols) {
    const int64_t j_count = cols - j0 < kCols ? cols - j0 : kCols;
    const int8_t* qweight = args.qweight + (n0 + j0) * args.qweight_stride;
    int32_t offset[kCols];
    for (int64_t j = 0; j < j_count; ++j) offset[j] = offset_part(qweight + j * args.qweight_stride, args.K);
    for (int64_t i0 = 0; i0 < rows; i0 += kVectors * kLanes) {
      const uint8_t* block = tokens + (m0 + i0) / kLanes * block_size;
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
        store_block(args, m0 + i, rows - i < kLanes ? rows - i : kLanes, n0 + j0, j_count, acc + v * kLanes,
                    kAccStride, offset);
      }
    }
  }
}

}  // namespace dtm_fast
