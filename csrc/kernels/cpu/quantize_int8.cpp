#include "quantize_int8.h"

#include <algorithm>

#include "parallel_for.h"

namespace dtm_fast {

void quantize_int8(CpuIsa isa, const QuantizeInt8& args, int num_threads) {
  require_cpu_isa(isa);
  const auto quantize_row = isa >= CpuIsa::kAvx512 ? quantize_int8_row_avx512 : quantize_int8_row_avx2;
  constexpr int64_t kRowsPerTask = 16;
  const int64_t tasks = (args.M + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(tasks, num_threads, [&](int64_t task, int) {
    const int64_t end = std::min(args.M, (task + 1) * kRowsPerTask);
    for (int64_t m = task * kRowsPerTask; m < end; ++m) {
      const char* row = static_cast<const char*>(args.x) + m * args.x_stride * size_of(args.x_type);
      args.scale[m] = quantize_row(row, args.x_type, args.K, args.qx + m * args.K);
    }
  });
}

}  // namespace dtm_fast
