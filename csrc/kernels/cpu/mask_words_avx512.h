// The bits of masks in groups of 32. Included only by files compiled for at least AVX-512; everything is in
// an anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace dtm_fast {
namespace {

// Bits k .. k + 31 of a mask row.
inline __mmask32 mask_bits(const uint8_t* mask_row, int64_t k) {
  uint32_t bits;
  std::memcpy(&bits, mask_row + k / 8, sizeof bits);
  return bits;
}

// The same of a row that ends before bit k + 32.
inline __mmask32 mask_bits_to_end(const uint8_t* mask_row, int64_t k, int64_t K) {
  uint32_t bits = 0;
  for (int64_t byte = 0; k + 8 * byte < K; ++byte) bits |= uint32_t{mask_row[k / 8 + byte]} << 8 * byte;
  return bits;
}

}  // namespace
}  // namespace dtm_fast
