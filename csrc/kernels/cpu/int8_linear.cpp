#include "int8_linear.h"

#include <algorithm>
#include <stdexcept>

#include "parallel_for.h"
#include "scratch_buffer.h"
#include "store_float.h"

namespace dtm_fast {
namespace {

// A tile's int32 sums (60 KiB) and, for K around a thousand, its operands stay in the second-level cache. 240
// rows are five times the 48 tokens that the token tile keeps in registers.
constexpr int64_t kTileRows = 240;
constexpr int64_t kTileCols = 64;
// Fewer tokens would leave most of a vector of 16 idle.
constexpr int64_t kPackTokensFrom = 8;

Int8DotTile* choose(CpuIsa isa) {
  if (isa >= CpuIsa::kAvx512Vnni) return int8_dot_tile_avx512_vnni;
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

// Calls run(m0, rows, n0, cols, thread) for every tile of y.
template <typename Run>
void for_each_tile(const Int8Linear& args, int num_threads, const Run& run) {
  const int64_t row_tiles = (args.M + kTileRows - 1) / kTileRows;
  const int64_t col_tiles = (args.N + kTileCols - 1) / kTileCols;
  parallel_for(row_tiles * col_tiles, num_threads, [&](int64_t task, int thread) {
    // Row tiles of one column tile follow each other, so that its weights are read from memory once.
    const int64_t m0 = task % row_tiles * kTileRows;
    const int64_t n0 = task / row_tiles * kTileCols;
    run(m0, std::min(kTileRows, args.M - m0), n0, std::min(kTileCols, args.N - n0), thread);
  });
}

void by_dot_products(Int8DotTile* dot_tile, const Int8Linear& args, int num_threads) {
  ScratchBuffer<int32_t> scratch(std::max(1, num_threads), kTileRows * kTileCols);
  for_each_tile(args, num_threads, [&](int64_t m0, int64_t rows, int64_t n0, int64_t cols, int thread) {
    int32_t* acc = scratch.part(thread);
    dot_tile(args.qx + m0 * args.K, rows, args.qweight + n0 * args.qweight_stride, args.qweight_stride, cols,
             args.K, acc, kTileCols);
    for (int64_t i = 0; i < rows; ++i) store_row(args, m0 + i, n0, cols, acc + i * kTileCols);
  });
}

void by_packed_tokens(Int8TokenTile* token_tile, const Int8Linear& args, int num_threads) {
  const int64_t blocks = (args.M + kInt8TokenBlock - 1) / kInt8TokenBlock;
  const int64_t block_size = kInt8TokenBlock * 4 * int8_token_groups(args.K);
  ScratchBuffer<uint8_t> tokens(1, blocks * block_size);
  parallel_for(blocks, num_threads, [&](int64_t block, int) {
    int8_pack_tokens_avx512(args.qx, args.M, args.K, block, tokens.part(0) + block * block_size);
  });
  for_each_tile(args, num_threads, [&](int64_t m0, int64_t rows, int64_t n0, int64_t cols, int) {
    token_tile(args, tokens.part(0), m0, rows, n0, cols);
  });
}

}  // namespace

void int8_linear(CpuIsa isa, const Int8Linear& args, int num_threads) {
  require_cpu_isa(isa);
  if (args.K > kInt8LinearMaxK) throw std::invalid_argument("int8_linear: K is too large for int32 sums");
  if (isa >= CpuIsa::kAvx512Vnni && args.M >= kPackTokensFrom) {
    by_packed_tokens(isa == CpuIsa::kAmx ? int8_token_tile_amx : int8_token_tile_avx512_vnni, args,
                     num_threads);
  } else {
    by_dot_products(choose(isa), args, num_threads);
  }
}

}  // namespace dtm_fast
