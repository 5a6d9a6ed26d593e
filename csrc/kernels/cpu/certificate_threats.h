// How many of a certificate's tokens a new hidden state may have overtaken.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace dtm_fast {

// hidden  : [P, D] of type, row stride hidden_stride
// base    : [P, D] of type, contiguous
// radius  : [P, R] float32
// threats : [P] int64
//
//   distance[p] = an upper bound of ‖hidden[p] - base[p]‖, computed in float64
//   threats[p]  = the number of r with not (distance[p] < radius[p, r]); a NaN threatens
//
// The bound: the norm, rounded to float32, times `enlarged` (what the few operations round) plus `added`.
struct CertificateThreats {
  FloatType type;
  const void* hidden;
  int64_t hidden_stride;
  const void* base;
  const float* radius;
  int64_t P, D, R;
  float enlarged, added;
  int64_t* threats;
};

void certificate_threats(const CertificateThreats& args, int num_threads);

}  // namespace dtm_fast
