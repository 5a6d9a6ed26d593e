// What the kernels of token_divergence.h share: who leads, and a row's summary over a tile of the vocabulary.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dtm_fast {

// A logit and its token id. Of two, the larger logit leads, NaN being the largest, and the lower id among
// equals.
struct Candidate {
  float logit;
  int32_t id;
};

// Whether a logit takes the lead from one of a lower id.
__device__ inline bool takes_lead(float logit, float leading) {
  return logit > leading || (logit != logit && leading == leading);
}

__device__ inline Candidate leader(const Candidate& a, const Candidate& b) {
  const bool b_leads = a.id < b.id ? takes_lead(b.logit, a.logit) : !takes_lead(a.logit, b.logit);
  return b_leads ? b : a;
}

// Among kLanes neighbouring lanes; all of them get it.
template <int kLanes>
__device__ inline Candidate leader_of_lanes(Candidate candidate) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2)
    candidate = leader(candidate, {__shfl_xor_sync(0xffffffffu, candidate.logit, distance),
                                   __shfl_xor_sync(0xffffffffu, candidate.id, distance)});
  return candidate;
}

// Both partners of an exchange add the same two numbers, so that all lanes get the same sum, in a fixed
// order.
template <int kLanes>
__device__ inline float sum_of_lanes(float sum) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// One term of a sum of exponentials of at most 0: absolute errors count, and those of __expf stay below
// 2^-22.
__device__ inline float exp_term(float logit, float largest) { return __expf(logit - largest); }

}  // namespace dtm_fast
