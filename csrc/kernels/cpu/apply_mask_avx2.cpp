#include <immintrin.h>

#include "apply_mask.h"

namespace dtm_fast {
namespace {

// Every lane gets all bits of the mask and tests its own: lane i is all ones where bit i is set.
__m256i lanes_of_8(uint8_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), bit), bit);
}

__m256i lanes_of_16(uint8_t low, uint8_t high) {
  const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                        static_cast<int16_t>(0x8000));
  const auto bits = static_cast<int16_t>(low | high << 8);
  return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(bits), bit), bit);
}

template <typename Bits>
void clear(const Bits* weight, __m256i kept, Bits* y) {
  const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm256_and_si256(entries, kept));
}

template <typename Bits>
void apply_tail(const Bits* weight, const uint8_t* mask, int64_t k, int64_t K, Bits* y) {
  for (; k < K; ++k) y[k] = mask[k / 8] >> (k % 8) & 1 ? weight[k] : Bits{0};
}

}  // namespace

void apply_mask_row32_avx2(const uint32_t* weight, const uint8_t* mask, int64_t K, uint32_t* y) {
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) clear(weight + k, lanes_of_8(mask[k / 8]), y + k);
  apply_tail(weight, mask, k, K, y);
}

void apply_mask_row16_avx2(const uint16_t* weight, const uint8_t* mask, int64_t K, uint16_t* y) {
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) clear(weight + k, lanes_of_16(mask[k / 8], mask[k / 8 + 1]), y + k);
  apply_tail(weight, mask, k, K, y);
}

}  // namespace dtm_fast
