#include <immintrin.h>

#include <cstring>

#include "apply_mask.h"

namespace dtm_fast {
namespace {

// The bits of columns k .. k + 31; 0 beyond K. Bytes beyond the row are not read.
__mmask32 next_bits(const uint8_t* mask, int64_t k, int64_t K) {
  const int64_t columns = K - k < 32 ? K - k : 32;
  uint32_t bits = 0;
  std::memcpy(&bits, mask + k / 8, static_cast<size_t>((columns + 7) / 8));
  return columns == 32 ? bits : bits & ((1u << columns) - 1u);
}

__mmask32 first_of_32(int64_t count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1u; }

}  // namespace

void apply_mask_row32_avx512(const uint32_t* weight, const uint8_t* mask, int64_t K, uint32_t* y) {
  for (int64_t k = 0; k < K; k += 32) {
    const __mmask32 kept = next_bits(mask, k, K), inside = first_of_32(K - k);
    for (int half = 0; half < 32; half += 16) {
      const __m512i entries =
          _mm512_maskz_loadu_epi32(static_cast<__mmask16>(kept >> half), weight + k + half);
      _mm512_mask_storeu_epi32(y + k + half, static_cast<__mmask16>(inside >> half), entries);
    }
  }
}

void apply_mask_row16_avx512(const uint16_t* weight, const uint8_t* mask, int64_t K, uint16_t* y) {
  for (int64_t k = 0; k < K; k += 32) {
    const __m512i entries = _mm512_maskz_loadu_epi16(next_bits(mask, k, K), weight + k);
    _mm512_mask_storeu_epi16(y + k, first_of_32(K - k), entries);
  }
}

}  // namespace dtm_fast
