// How many of a certificate's tokens a new hidden state may have overtaken.
#pragma once

#include <cstdint>

#include "cpu_features.h"
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

void certificate_threats(CpuIsa isa, const CertificateThreats& args, int num_threads);

// threats[p], of which certificate_threats is made.
using ThreatsOfPosition = int64_t(const CertificateThreats& args, int64_t p);
ThreatsOfPosition threats_of_position_avx2;
ThreatsOfPosition threats_of_position_avx512;

}  // namespace dtm_fast
