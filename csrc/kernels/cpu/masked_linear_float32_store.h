// Storing the sums of float32_steps_amx.h as results of masked_linear. Included only by files compiled for at
// least AVX-512; everything is in an anonymous namespace, so that no copy can reach a file of a lower
// instruction set.
#pragma once

#include "avx512_vectors.h"
#include "masked_linear_float32.h"

namespace dtm_fast {
namespace {

// y[v, m : m + rows, n : n + cols] from the sums [32 weight rows][16 rows of x], rows <= 16, cols <= 32.
// Marks the rows that have results which are not finite.
inline void store_float32_block(const MaskedLinear& args, int64_t v, int64_t m, int64_t rows, int64_t n,
                                int64_t cols, const float* sums, RowMark* marks) {
  constexpr int kNanOrInfinity = 0x99;
  for (int64_t j = 0; j < cols; j += 16, sums += 16 * 16) {
    const __mmask16 lanes = first_lanes(cols - j);
    __m512 bias = _mm512_setzero_ps();
    if (args.bias != nullptr) bias = _mm512_maskz_loadu_ps(lanes, args.bias + n + j);
    float* y = static_cast<float*>(args.y) + (v * args.M + m) * args.N + n + j;
    __m512i r[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(sums + i * 16);
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      if (i >= rows) continue;
      __m512 value = _mm512_castsi512_ps(r[i]);
      if (args.bias != nullptr) value = _mm512_add_ps(value, bias);
      _mm512_mask_storeu_ps(y + i * args.N, lanes, value);
      if (_mm512_mask_fpclass_ps_mask(lanes, value, kNanOrInfinity) == 0) continue;
      // Other threads may do so at the same time.
      if (__atomic_load_n(marks + i, __ATOMIC_RELAXED) != RowMark::kNone) continue;
      __atomic_store_n(marks + i, RowMark::kNotFinite, __ATOMIC_RELAXED);
    }
  }
}

}  // namespace
}  // namespace dtm_fast
