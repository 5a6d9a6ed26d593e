// One bool per byte <-> one bool per bit.
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace dtm_fast {

// mask   : [N, K] bytes, 0 or not 0, row stride mask_stride
// packed : [N, ceil(K / 8)], row stride packed_stride
//
//   packed[n, k / 8] bit (k mod 8) = mask[n, k] != 0; bits beyond K are 0
struct PackMask {
  const uint8_t* mask;
  int64_t mask_stride;
  int64_t N, K;
  uint8_t* packed;
  int64_t packed_stride;
};

void pack_mask(CpuIsa isa, const PackMask& args, int num_threads);

// The inverse: mask[n, k] = 0 or 1. Bits beyond K are not looked at.
struct UnpackMask {
  const uint8_t* packed;
  int64_t packed_stride;
  int64_t N, K;
  uint8_t* mask;
  int64_t mask_stride;
};

void unpack_mask(CpuIsa isa, const UnpackMask& args, int num_threads);

// One row.
void pack_mask_row_avx2(const uint8_t* mask, int64_t K, uint8_t* packed);
void pack_mask_row_avx512(const uint8_t* mask, int64_t K, uint8_t* packed);
void unpack_mask_row_avx2(const uint8_t* packed, int64_t K, uint8_t* mask);
void unpack_mask_row_avx512(const uint8_t* packed, int64_t K, uint8_t* mask);

}  // namespace dtm_fast
