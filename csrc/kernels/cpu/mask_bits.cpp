#include "mask_bits.h"

#include <algorithm>

#include "large_pages.h"
#include "parallel_for.h"

namespace dtm_fast {
namespace {

constexpr int64_t kRowsPerTask = 16;

}  // namespace

void pack_mask(CpuIsa isa, const PackMask& args, int num_threads) {
  require_cpu_isa(isa);
  const auto pack_row = isa >= CpuIsa::kAvx512 ? pack_mask_row_avx512 : pack_mask_row_avx2;
  parallel_for((args.N + kRowsPerTask - 1) / kRowsPerTask, num_threads, [&](int64_t task, int) {
    const int64_t end = std::min(args.N, (task + 1) * kRowsPerTask);
    for (int64_t n = task * kRowsPerTask; n < end; ++n) {
      pack_row(args.mask + n * args.mask_stride, args.K, args.packed + n * args.packed_stride);
    }
  });
}

void unpack_mask(CpuIsa isa, const UnpackMask& args, int num_threads) {
  require_cpu_isa(isa);
  populate_large_pages(args.mask, (args.N - 1) * args.mask_stride + args.K, num_threads);
  const auto unpack_row = isa >= CpuIsa::kAvx512 ? unpack_mask_row_avx512 : unpack_mask_row_avx2;
  parallel_for((args.N + kRowsPerTask - 1) / kRowsPerTask, num_threads, [&](int64_t task, int) {
    const int64_t end = std::min(args.N, (task + 1) * kRowsPerTask);
    for (int64_t n = task * kRowsPerTask; n < end; ++n) {
      unpack_row(args.packed + n * args.packed_stride, args.K, args.mask + n * args.mask_stride);
    }
  });
}

}  // namespace dtm_fast
