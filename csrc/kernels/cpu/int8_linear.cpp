#include "int8_linear.h"

#include <algorithm>
#include <stdexcept>

#include "large_pages.h"
#include "parallel_for.h"
#include "quantize_int8.h"
#include "row_tiles.h"
#include "scratch_buffer.h"
#include "store_float.h"

namespace dtm_fast {
namespace {

constexpr int64_t kTileCols = 64;
// On AMX: where a tile ends, what follows it was fetched ahead for nothing if another thread takes it.
constexpr int64_t kMostTileCols = 256;
constexpr int64_t kDotTileCols = 256;
// So many tokens or fewer wait for the weights. Then every thread reads one run of them: memory gives most to
// few long streams.
constexpr int64_t kFewTokens = 64;
// Rows of a tile of dot products: few, for its int32 sums (60 to 240 KiB) to stay in the second-level cache.
constexpr int64_t kDotTileRows = 240;
// The packed tokens of a tile stay in the second-level cache while the weights pass by.
constexpr int64_t kTokenTileBytes = int64_t{1} << 20;
// Columns of a tile of packed tokens for VNNI: one block of its sums.
constexpr int64_t kTokenTileCols = 96;
// Rows that a thread quantizes for itself: packed they stay in its second-level cache.
constexpr int64_t kOwnRows = 128;
// So many such tasks per thread leave none idle for long at the end.
constexpr int64_t kOwnTasks = 4;
// Each of them reads the weight anew, which must not come from memory.
constexpr int64_t kOwnWeightBytes = int64_t{4} << 20;
// Fewer tokens would leave most of a tile of 16 idle.
constexpr int64_t kPackTokensFromAmx = 5;
// Fewer tokens are finished before the weights have come; dot products read those in the order of memory.
constexpr int64_t kPackTokensFromVnni = 25;
// So much of y for a thread is not in its second-level cache any more when it is read: stored past the caches
// it need not come from memory before. On a Xeon with AMX that takes 0.66 to 0.96 of the time, of less y up
// to 1.07.
constexpr int64_t kStreamedBytes = int64_t{5} << 20;
constexpr int64_t kLineBytes = 64;
// A row of quantized tokens is an odd multiple of this long, so that the same part of 16 tokens, together
// with weights, fit into a first-level cache whose ways hold 4 KiB.
constexpr int64_t kTokenStride = 1024;

Int8DotTile* choose(CpuIsa isa) {
  if (isa >= CpuIsa::kAvx512Vnni) return int8_dot_tile_avx512_vnni;
  return isa == CpuIsa::kAvx512 ? int8_dot_tile_avx512 : int8_dot_tile_avx2;
}

const void* token(const Int8Linear& args, int64_t m) {
  return static_cast<const char*>(args.x) + m * args.x_stride * size_of(args.type);
}

void store_row(const Int8Linear& args, float scale_x, int64_t m, int64_t n0, int64_t cols,
               const int32_t* acc) {
  float row[kDotTileCols];
  for (int64_t j = 0; j < cols; ++j) {
    row[j] = static_cast<float>(acc[j]) * (scale_x * args.scale_w[n0 + j]);
  }
  if (args.bias != nullptr) {
    for (int64_t j = 0; j < cols; ++j) row[j] += args.bias[n0 + j];
  }
  store_floats(args.y, args.type, m * args.N + n0, row, cols);
}

// Calls run(m0, rows, n0, cols, thread) for every tile of y.
template <typename Run>
void for_each_tile(const Int8Linear& args, int64_t tile_rows, int64_t tile_cols, int num_threads,
                   const Run& run) {
  const int64_t row_tiles = (args.M + tile_rows - 1) / tile_rows;
  const int64_t col_tiles = (args.N + tile_cols - 1) / tile_cols;
  parallel_for(row_tiles * col_tiles, num_threads, [&](int64_t task, int thread) {
    // Column tiles of one row tile follow each other, which all read its tokens out of the second-level
    // cache.
    const int64_t m0 = task / col_tiles * tile_rows;
    const int64_t n0 = task % col_tiles * tile_cols;
    run(m0, std::min(tile_rows, args.M - m0), n0, std::min(tile_cols, args.N - n0), thread);
  });
}

void by_dot_products(CpuIsa isa, const Int8Linear& args, int num_threads) {
  Int8DotTile* const dot_tile = choose(isa);
  const int64_t qx_stride = ((args.K + kTokenStride - 1) / kTokenStride | 1) * kTokenStride;
  ScratchBuffer<int8_t> qx(1, args.M * qx_stride);
  ScratchBuffer<float> scale_x(1, args.M);
  parallel_for(args.M, num_threads, [&](int64_t m, int) {
    int8_t* row = qx.part(0) + m * qx_stride;
    float* scale = scale_x.part(0) + m;
    if (isa >= CpuIsa::kAvx512) {
      quantize_int8_rows_avx512(token(args, m), args.type, args.x_stride, 1, args.K, row, scale);
    } else {
      *scale = quantize_int8_row_avx2(token(args, m), args.type, args.K, row);
    }
  });
  const int64_t tile_rows = std::min(kDotTileRows, args.M);
  const int64_t threads = std::max(1, num_threads);
  const int64_t share = args.N / (4 * threads);
  const int64_t tile_cols = std::clamp(share / kTileCols * kTileCols, kTileCols, kDotTileCols);
  const int64_t tiles = std::max(int64_t{1}, (args.N + tile_cols - 1) / tile_cols);
  const int64_t run_cols = args.M <= kFewTokens ? (tiles + threads - 1) / threads * tile_cols : tile_cols;
  ScratchBuffer<int32_t> scratch(threads, tile_rows * tile_cols);
  for_each_tile(args, kDotTileRows, run_cols, num_threads,
                [&](int64_t m0, int64_t rows, int64_t run_begin, int64_t run_size, int thread) {
                  int32_t* acc = scratch.part(thread);
                  for (int64_t n0 = run_begin; n0 < run_begin + run_size; n0 += tile_cols) {
                    const int64_t cols = std::min(tile_cols, run_begin + run_size - n0);
                    dot_tile(qx.part(0) + m0 * qx_stride, qx_stride, rows,
                             args.qweight + n0 * args.qweight_stride, args.qweight_stride, cols, args.K, acc,
                             tile_cols);
                    for (int64_t i = 0; i < rows; ++i) {
                      store_row(args, scale_x.part(0)[m0 + i], m0 + i, n0, cols, acc + i * tile_cols);
                    }
                  }
                });
}

// Quantizes and packs token block `block`.
void pack_block(const Int8Linear& args, int64_t block, int8_t* qx, int8_t* packed, float* scale,
                int32_t* start) {
  const int64_t m0 = block * kInt8TokenBlock;
  const int64_t count = std::min(kInt8TokenBlock, args.M - m0);
  quantize_int8_rows_avx512(token(args, m0), args.type, args.x_stride, count, args.K, qx, scale);
  int8_pack_tokens_avx512(qx, count, args.K, packed, start);
}

// With enough rows for every thread, each quantizes some of its own and multiplies them by all of the weight:
// no thread waits for another, nor reads tokens out of its cache.
void by_own_tokens(const Int8Linear& args, int num_threads) {
  const int64_t block_size = kInt8TokenBlock * 4 * int8_token_groups(args.K);
  const int64_t tasks = (args.M + kOwnRows - 1) / kOwnRows;
  const int64_t blocks = kOwnRows / kInt8TokenBlock;
  const int threads = threads_used(tasks, num_threads);
  ScratchBuffer<int8_t> packed(threads, blocks * block_size);
  ScratchBuffer<int8_t> quantized(threads, kInt8TokenBlock * args.K);
  ScratchBuffer<float> scale(threads, kOwnRows);
  ScratchBuffer<int32_t> start(threads, kOwnRows);
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    const int64_t m0 = task * kOwnRows;
    const int64_t rows = std::min(kOwnRows, args.M - m0);
    const Int8Tokens tokens = {packed.part(thread), scale.part(thread), start.part(thread)};
    for (int64_t i = 0; i < rows; i += kInt8TokenBlock) {
      pack_block(args, (m0 + i) / kInt8TokenBlock, quantized.part(thread),
                 tokens.packed + i / kInt8TokenBlock * block_size, tokens.scale + i, tokens.start + i);
    }
    Int8Linear own = args;
    own.y = static_cast<char*>(args.y) + m0 * args.N * size_of(args.type);
    own.M = rows;
    int8_token_tile_avx512_vnni(own, tokens, 0, rows, 0, args.N);
  });
}

bool has_own_tokens(const Int8Linear& args, int num_threads) {
  const bool enough_rows = args.M >= kOwnRows * kOwnTasks * std::max(1, num_threads);
  return enough_rows && args.N * args.K <= kOwnWeightBytes;
}

void by_packed_tokens(CpuIsa isa, const Int8Linear& args, int num_threads) {
  const bool amx = isa == CpuIsa::kAmx;
  if (!amx && has_own_tokens(args, num_threads)) {
    by_own_tokens(args, num_threads);
    return;
  }
  const int64_t blocks = (args.M + kInt8TokenBlock - 1) / kInt8TokenBlock;
  const int64_t block_size = kInt8TokenBlock * 4 * int8_token_groups(args.K);
  ScratchBuffer<int8_t> packed(1, blocks * block_size);
  ScratchBuffer<float> scale(1, args.M);
  ScratchBuffer<int32_t> start(1, blocks * kInt8TokenBlock);
  const Int8Tokens tokens = {packed.part(0), scale.part(0), start.part(0)};
  ScratchBuffer<int8_t> quantized(threads_used(blocks, num_threads), kInt8TokenBlock * args.K);
  parallel_for(blocks, num_threads, [&](int64_t block, int thread) {
    const int64_t m0 = block * kInt8TokenBlock;
    pack_block(args, block, quantized.part(thread), tokens.packed + block * block_size, tokens.scale + m0,
               tokens.start + m0);
  });
  Int8TokenTile* const token_tile = amx ? int8_token_tile_amx : int8_token_tile_avx512_vnni;
  const int64_t fitting_rows = kTokenTileBytes / std::max(int64_t{1}, block_size) * kInt8TokenBlock;
  const int64_t step = amx ? 32 : 64;  // the tokens that are multiplied at a time
  const int64_t tile_rows = std::clamp(fitting_rows / step * step, step, kInt8TokenTileRows);
  const int64_t share = args.N / (4 * std::max(1, num_threads)) / kTileCols * kTileCols;
  const int64_t tile_cols = amx ? std::clamp(share, kTileCols, kMostTileCols) : kTokenTileCols;
  for_each_tile(args, tile_rows, tile_cols, num_threads,
                [&](int64_t m0, int64_t rows, int64_t n0, int64_t cols, int) {
                  token_tile(args, tokens, m0, rows, n0, cols);
                });
}

// Rows of x as tiles, each task multiplying some of them by all of the packed weight; false where that does
// not pay.
bool by_rows(const Int8Linear& args, int num_threads) {
  const RowTiles tiles = {args.M, args.N, args.K};
  const int64_t task_rows = tiles.rows_of_task(num_threads);
  if (task_rows == 0) return false;
  ScratchBuffer<char> weight(1, tiles.weight_bytes());
  parallel_for(RowTiles::blocks(args.N), num_threads, [&](int64_t block, int) {
    int8_pack_weight_amx(args, block, weight.part(0) + block * tiles.block_bytes());
  });
  const int64_t tasks = (args.M + task_rows - 1) / task_rows, blocks = RowTiles::blocks(task_rows);
  const int threads = threads_used(tasks, num_threads);
  ScratchBuffer<int8_t> quantized(threads, kInt8TokenBlock * args.K);
  ScratchBuffer<float> scale(threads, task_rows);
  ScratchBuffer<char> rows(threads, blocks * tiles.block_bytes());
  ScratchBuffer<int32_t> sums(threads, blocks * kBlockSums);
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    const int64_t m0 = task * task_rows;
    int8_rows_amx(args, weight.part(0), m0, std::min(task_rows, args.M - m0),
                  {quantized.part(thread), scale.part(thread), rows.part(thread), sums.part(thread)});
  });
  return true;
}

bool is_streamed(CpuIsa isa, const Int8Linear& args, int num_threads) {
  const int64_t row_bytes = args.N * size_of(args.type);
  const bool on_lines = reinterpret_cast<uintptr_t>(args.y) % kLineBytes == 0 && row_bytes % kLineBytes == 0;
  return isa == CpuIsa::kAmx && on_lines && args.M * row_bytes >= kStreamedBytes * std::max(1, num_threads);
}

void multiply(CpuIsa isa, const Int8Linear& args, int num_threads) {
  if (isa == CpuIsa::kAmx && by_rows(args, num_threads)) return;
  const int64_t pack_from = isa == CpuIsa::kAmx ? kPackTokensFromAmx : kPackTokensFromVnni;
  if (isa >= CpuIsa::kAvx512Vnni && args.M >= pack_from) {
    by_packed_tokens(isa, args, num_threads);
  } else {
    by_dot_products(isa, args, num_threads);
  }
}

}  // namespace

void int8_linear(CpuIsa isa, const Int8Linear& args, int num_threads) {
  require_cpu_isa(isa);
  if (args.K > kInt8LinearMaxK) throw std::invalid_argument("int8_linear: K is too large for int32 sums");
  populate_large_pages(args.y, args.M * args.N * size_of(args.type), num_threads);
  Int8Linear own = args;
  own.stream_y = is_streamed(isa, args, num_threads);
  multiply(isa, own, num_threads);
}

}  // namespace dtm_fast
