#include "quantize_int8.h"

#include <algorithm>

#include "parallel_for.h"

namespace dtm_fast {

void quantize_int8(CpuIsa isa, const QuantizeInt8& args, int num_threads) {
  require_cpu_isa(isa);
  constexpr int64_t kRowsPerTask = 16;
  const int64_t tasks = (args.M + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(tasks, num_threads, [&](int64_t task, int) {
    const int64_t first = task * kRowsPerTask;
    const int64_t end = std::min(args.M, first + kRowsPerTask);
    const auto row = [&](int64_t m) {
      return static_cast<const char*>(args.x) + m * args.x_stride * size_of(args.x_type);
    };
    if (isa >= CpuIsa::kAvx512) {
      quantize_int8_rows_avx512(row(first), args.x_type, args.x_stride, end - first, args.K,
                                args.qx + first * args.K, args.scale + first);
      return;
    }
    for (int64_t m = first; m < end; ++m) {
      args.scale[m] = quantize_int8_row_avx2(row(m), args.x_type, args.K, args.qx + m * args.K);
    }
  });
}

}  // namespace dtm_fast
