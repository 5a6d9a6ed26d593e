// The one instruction of VNNI. Included only by files compiled for AVX-512 VNNI; everything is in an
// anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

namespace dtm_fast {
namespace {

// sum + the four products of unsigned bytes of w and signed bytes of x in each lane, in place. The intrinsic
// means the same, but GCC 12 copies every sum before and after it, and spills what then has no register.
inline __m512i add_products(__m512i sum, __m512i w, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

}  // namespace
}  // namespace dtm_fast
