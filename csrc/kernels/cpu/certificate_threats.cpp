#include "certificate_threats.h"

#include <algorithm>

#include "parallel_for.h"

namespace dtm_fast {

void certificate_threats(CpuIsa isa, const CertificateThreats& args, int num_threads) {
  require_cpu_isa(isa);
  constexpr int64_t kRowsPerTask = 32;
  ThreatsOfPosition* const threats =
      isa >= CpuIsa::kAvx512 ? threats_of_position_avx512 : threats_of_position_avx2;
  parallel_for((args.P + kRowsPerTask - 1) / kRowsPerTask, num_threads, [&](int64_t task, int) {
    const int64_t end = std::min(args.P, (task + 1) * kRowsPerTask);
    for (int64_t p = task * kRowsPerTask; p < end; ++p) args.threats[p] = threats(args, p);
  });
}

}  // namespace dtm_fast
