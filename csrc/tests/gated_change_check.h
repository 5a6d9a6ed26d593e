// gated_change of whole arrays, from the kernels' header.
#pragma once

#include <cstdint>

namespace dtm_fast::test {

// out[i] = silu(gate[i] + gate_change[i]) * (up[i] + up_change[i]) - silu(gate[i]) * up[i]; count a multiple
// of 16
void gated_change_avx512(const float* gate, const float* up, const float* gate_change, const float* up_change,
                         int64_t count, float* out);

}  // namespace dtm_fast::test
