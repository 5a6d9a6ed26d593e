#include <stdexcept>

#include "check.h"

using namespace dtm_fast;

namespace {

bool is_refused(int isa) {
  try {
    require_cpu_isa(CpuIsa(isa));
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  const CpuIsa detected = detected_cpu_isa();
  // The compiler's own detection, which also asks the operating system (GCC 12: libgcc's cpuinfo).
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  CHECK((detected >= CpuIsa::kAvx2) == avx2);
  CHECK((detected >= CpuIsa::kAvx512) == avx512);
  CHECK((detected >= CpuIsa::kAvx512Vnni) == vnni);
  for (int isa = -1; isa <= 6; ++isa) CHECK(is_refused(isa) == (isa < 1 || isa > static_cast<int>(detected)));
}
