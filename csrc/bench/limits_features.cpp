#include "limits_features.h"

#include <cpuid.h>

#include <cstdint>

#include "../kernels/cpu/cpu_features.h"

namespace dtm_fast::bench {

bool has_avx512_bf16() {
  if (detected_cpu_isa() < CpuIsa::kAvx512) return false;  // it has looked at XCR0
  uint32_t eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 5)) != 0;
}

bool has_amx_bf16() {
  uint32_t eax, ebx, ecx, edx;
  return detected_cpu_isa() >= CpuIsa::kAmx && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (edx & (1u << 22)) != 0;
}

}  // namespace dtm_fast::bench
