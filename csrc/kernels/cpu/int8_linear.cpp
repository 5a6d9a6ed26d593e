#include "int8_linear.h"

#include <algorithm>
#include <stdexcept>

#include "parallel_for.h"
#include "scratch_buffer.h"
#include "store_float.h"

namespace dtm_fast {
namespace {

// A tile's int32 sums (64 KiB) and, for K around a thousand, its operands stay in the second-level cache.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileCols = 64;

Int8DotTile* choose(CpuIsa isa) {
  if (isa == CpuIsa::kAvx512Vnni) return int8_dot_tile_avx512_vnni;
  return isa == CpuIsa::kAvx512 ? int8_dot_tile_avx512 : int8_dot_tile_avx2;
}

void store_row(const Int8Linear& args, int64_t m, int64_t n0, int64_t cols, const int32_t* acc) {
  float row[kTileCols];
  for (int64_t j = 0; j < cols; ++j) {
    row[j] = static_cast<float>(acc[j]) * (args.scale_x[m] * args.scale_w[n0 + j]);
  }
  if (args.bias != nullptr) {
    for (int64_t j = 0; j < cols; ++j) row[j] += args.bias[n0 + j];
  }
  store_floats(args.y, args.y_type, m * args.N + n0, row, cols);
}

}  // namespace

void int8_linear(CpuIsa isa, const Int8Linear& args, int num_threads) {
  require_cpu_isa(isa);
  if (args.K > kInt8LinearMaxK) throw std::invalid_argument("int8_linear: K is too large for int32 sums");
  Int8DotTile* const dot_tile = choose(isa);
  const int64_t row_tiles = (args.M + kTileRows - 1) / kTileRows;
  const int64_t col_tiles = (args.N + kTileCols - 1) / kTileCols;
  const int64_t tasks = row_tiles * col_tiles;
  ScratchBuffer<int32_t> scratch(threads_used(tasks, num_threads), kTileRows * kTileCols);
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    // Row tiles of one column tile follow each other, so that its weights are read from memory once.
    const int64_t m0 = task % row_tiles * kTileRows;
    const int64_t n0 = task / row_tiles * kTileCols;
    const int64_t rows = std::min(kTileRows, args.M - m0);
    const int64_t cols = std::min(kTileCols, args.N - n0);
    int32_t* acc = scratch.part(thread);
    dot_tile(args.qx + m0 * args.K, rows, args.qweight + n0 * args.qweight_stride, args.qweight_stride, cols,
             args.K, acc, kTileCols);
    for (int64_t i = 0; i < rows; ++i) store_row(args, m0 + i, n0, cols, acc + i * kTileCols);
  });
}

}  // namespace dtm_fast
