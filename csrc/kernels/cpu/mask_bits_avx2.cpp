#include <immintrin.h>

#include <cstring>

#include "mask_bits.h"

namespace dtm_fast {
namespace {

uint32_t pack_32(const uint8_t* mask) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
  const __m256i is_zero = _mm256_cmpeq_epi8(bytes, _mm256_setzero_si256());
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(is_zero));
}

// Byte i of the result is bit i: every byte gets a copy of the byte its bit is in, then tests that bit.
__m256i unpack_32(uint32_t bits) {
  const __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits)), source);
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(1));
}

size_t packed_bytes(int64_t columns) { return static_cast<size_t>((columns + 7) / 8); }

}  // namespace

void pack_mask_row_avx2(const uint8_t* mask, int64_t K, uint8_t* packed) {
  int64_t k = 0;
  for (; k + 32 <= K; k += 32) {
    const uint32_t bits = pack_32(mask + k);
    std::memcpy(packed + k / 8, &bits, sizeof bits);
  }
  if (k < K) {
    uint8_t tail[32] = {};
    std::memcpy(tail, mask + k, static_cast<size_t>(K - k));
    const uint32_t bits = pack_32(tail);
    std::memcpy(packed + k / 8, &bits, packed_bytes(K - k));
  }
}

void unpack_mask_row_avx2(const uint8_t* packed, int64_t K, uint8_t* mask) {
  int64_t k = 0;
  for (; k + 32 <= K; k += 32) {
    uint32_t bits;
    std::memcpy(&bits, packed + k / 8, sizeof bits);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + k), unpack_32(bits));
  }
  if (k < K) {
    uint32_t bits = 0;
    std::memcpy(&bits, packed + k / 8, packed_bytes(K - k));
    alignas(32) uint8_t tail[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(tail), unpack_32(bits));
    std::memcpy(mask + k, tail, static_cast<size_t>(K - k));
  }
}

}  // namespace dtm_fast
