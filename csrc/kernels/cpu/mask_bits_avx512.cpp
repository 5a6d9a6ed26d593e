#include <immintrin.h>

#include <cstring>

#include "avx512_vectors.h"
#include "mask_bits.h"

namespace dtm_fast {
namespace {

// How many bytes the bits of the next up to 64 columns take.
size_t packed_bytes(int64_t columns) { return columns >= 64 ? 8 : static_cast<size_t>((columns + 7) / 8); }

}  // namespace

void pack_mask_row_avx512(const uint8_t* mask, int64_t K, uint8_t* packed) {
  for (int64_t k = 0; k < K; k += 64) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(K - k), mask + k);
    const uint64_t bits = _mm512_test_epi8_mask(bytes, bytes);
    std::memcpy(packed + k / 8, &bits, packed_bytes(K - k));
  }
}

void unpack_mask_row_avx512(const uint8_t* packed, int64_t K, uint8_t* mask) {
  const __m512i kOnes = _mm512_set1_epi8(1);
  for (int64_t k = 0; k < K; k += 64) {
    uint64_t bits = 0;
    std::memcpy(&bits, packed + k / 8, packed_bytes(K - k));
    _mm512_mask_storeu_epi8(mask + k, first_bytes(K - k), _mm512_maskz_mov_epi8(bits, kOnes));
  }
}

}  // namespace dtm_fast
