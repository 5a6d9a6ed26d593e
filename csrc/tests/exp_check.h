// exp of a whole array, compiled once per instruction set from the kernels' headers.
#pragma once

#include <cstdint>

namespace dtm_fast::test {

// out[i] = exp(x[i]); count a multiple of 16, x[i] <= 0
void exp_avx2(const float* x, int64_t count, float* out);
void exp_avx512(const float* x, int64_t count, float* out);

}  // namespace dtm_fast::test
