// Pairs of bfloat16 as the lanes of gemm_panel_avx512.h. Included only by files compiled for AVX512-BF16;
// everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dtm_fast {
namespace {

// VDPBF16PS (Intel SDM vol. 2): sum = fma(x[0], w[0], fma(x[1], w[1], sum)), rounded to nearest even,
// denormal operands and results taken as zero.
struct PairLanes {
  static constexpr int64_t kLaneK = 2;
  static __m512 add_product(__m512 sum, __m512 x, __m512 w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
  }
  // Neighbours, rounded to nearest even; a denormal becomes zero.
  static __m512i pairs(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
  static void store_32(float* to, __m512 low, __m512 high) { _mm512_storeu_si512(to, pairs(low, high)); }
};

}  // namespace
}  // namespace dtm_fast
