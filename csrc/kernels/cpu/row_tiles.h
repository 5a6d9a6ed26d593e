// How work is cut, and how much memory it takes, where rows of x meet a packed weight (row_tiles_amx.h).
// Included by files of several instruction sets: everything is in an anonymous namespace, so that no copy can
// reach a file of a lower one.
#pragma once

#include <cstdint>

namespace dtm_fast {
namespace {

constexpr int64_t kTileBlock = 32;  // rows, and weight rows, that are multiplied at a time
constexpr int64_t kBlockSums = kTileBlock * kTileBlock;  // of their products

struct RowTiles {
  int64_t M, N, row_bytes;  // the bytes of a row of x or of the weight as they are multiplied

  static constexpr int64_t blocks(int64_t rows) { return (rows + kTileBlock - 1) / kTileBlock; }
  constexpr int64_t steps() const { return (row_bytes + 63) / 64; }
  constexpr int64_t block_bytes() const { return steps() * kTileBlock * 64; }
  constexpr int64_t weight_bytes() const { return blocks(N) * block_bytes(); }

  // Rows of a task: few enough for their packed bytes to stay in the second-level cache, and so many that the
  // weight is not read too often. As even as can be over the threads. 0 where transposing the weight costs
  // more than it saves, or reading it again for every task does.
  constexpr int64_t rows_of_task(int num_threads) const {
    constexpr int64_t kRows = 256, kMostRowBytes = 4096, kMostWeightBytes = int64_t{32} << 20;
    const int64_t threads = num_threads > 1 ? num_threads : 1;
    const bool worth = row_bytes > 0 && M >= kRows * threads && 4 * M >= row_bytes;
    if (!worth || row_bytes > kMostRowBytes || weight_bytes() > kMostWeightBytes) return 0;
    const int64_t each = (M + threads - 1) / threads;
    const int64_t turns = (each + kRows - 1) / kRows;
    return blocks((each + turns - 1) / turns) * kTileBlock;
  }
};

}  // namespace
}  // namespace dtm_fast
