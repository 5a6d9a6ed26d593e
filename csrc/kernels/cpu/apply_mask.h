// A weight with the entries that a bitmask drops set to zero.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"

namespace dtm_fast {

// weight : [N, K] of type, row stride weight_stride
// mask   : [N, ceil(K / 8)] bits, lowest first, row stride mask_stride; bits beyond K are not looked at
// y      : [N, K] of type, contiguous; may be weight itself
//
//   y[n, k] = bit k of mask[n] ? weight[n, k] : +0
struct ApplyMask {
  FloatType type;
  const void* weight;
  int64_t weight_stride;
  const uint8_t* mask;
  int64_t mask_stride;
  int64_t N, K;
  void* y;
};

void apply_mask(CpuIsa isa, const ApplyMask& args, int num_threads);

// One row of 4-byte or of 2-byte entries. Masking clears bits, so the entries' type does not matter.
void apply_mask_row32_avx2(const uint32_t* weight, const uint8_t* mask, int64_t K, uint32_t* y);
void apply_mask_row16_avx2(const uint16_t* weight, const uint8_t* mask, int64_t K, uint16_t* y);
void apply_mask_row32_avx512(const uint32_t* weight, const uint8_t* mask, int64_t K, uint32_t* y);
void apply_mask_row16_avx512(const uint16_t* weight, const uint8_t* mask, int64_t K, uint16_t* y);

}  // namespace dtm_fast
