#include "apply_mask.h"

#include <algorithm>

#include "large_pages.h"
#include "parallel_for.h"

namespace dtm_fast {
namespace {

constexpr int64_t kRowsPerTask = 16;

template <typename Bits, typename ApplyRow>
void apply_to_rows(const ApplyMask& args, int num_threads, const ApplyRow& apply_row) {
  const auto* weight = static_cast<const Bits*>(args.weight);
  auto* y = static_cast<Bits*>(args.y);
  parallel_for((args.N + kRowsPerTask - 1) / kRowsPerTask, num_threads, [&](int64_t task, int) {
    const int64_t end = std::min(args.N, (task + 1) * kRowsPerTask);
    for (int64_t n = task * kRowsPerTask; n < end; ++n) {
      apply_row(weight + n * args.weight_stride, args.mask + n * args.mask_stride, args.K, y + n * args.K);
    }
  });
}

}  // namespace

void apply_mask(CpuIsa isa, const ApplyMask& args, int num_threads) {
  require_cpu_isa(isa);
  populate_large_pages(args.y, args.N * args.K * size_of(args.type), num_threads);
  const bool avx512 = isa >= CpuIsa::kAvx512;
  if (size_of(args.type) == 4) {
    apply_to_rows<uint32_t>(args, num_threads, avx512 ? apply_mask_row32_avx512 : apply_mask_row32_avx2);
  } else {
    apply_to_rows<uint16_t>(args, num_threads, avx512 ? apply_mask_row16_avx512 : apply_mask_row16_avx2);
  }
}

}  // namespace dtm_fast
