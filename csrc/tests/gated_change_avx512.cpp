#include "../kernels/cpu/layer_rows_avx512.h"
#include "gated_change_check.h"

namespace dtm_fast::test {

void gated_change_avx512(const float* gate, const float* up, const float* gate_change, const float* up_change,
                         int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 change = gated_change(_mm512_loadu_ps(gate + i), _mm512_loadu_ps(up + i),
                                       _mm512_loadu_ps(gate_change + i), _mm512_loadu_ps(up_change + i));
    _mm512_storeu_ps(out + i, change);
  }
}

}  // namespace dtm_fast::test
