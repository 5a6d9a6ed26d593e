// A tile of a float32 product, by fused multiply-adds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tile_copy.cuh"

namespace dtm_fast {

// 16 x 16 threads share 16 * kThreadRows rows and 128 columns: thread (r, c) sums the rows r + 16 i and the
// columns c + 16 j. A stage has 16 elements of K as they lie in memory: a thread reads 4 at a time of each of
// its rows and columns, which costs as many reads as tiles turned over so that K comes first, and nothing to
// turn them.
template <int kThreadRowsOfTile, int kPipelineStages>
struct FfmaShape {
  static constexpr int kThreadRows = kThreadRowsOfTile, kThreadCols = 8, kStages = kPipelineStages;
  static constexpr int kSide = 16;
  static constexpr int kBlocks =
      kThreadRows > 4 ? 1 : 2;  // on a multiprocessor: registers for two sets of sums
  static constexpr int kThreads = kSide * kSide;
  static constexpr int kRows = kSide * kThreadRows, kCols = kSide * kThreadCols;
  static constexpr int kColTile = kRows * kTileBytes;  // where it begins in a stage
  static constexpr int kStageBytes = (kRows + kCols) * kTileBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  __device__ static int thread_row() { return static_cast<int>(threadIdx.x) / kSide; }
  __device__ static int thread_col() { return static_cast<int>(threadIdx.x) % kSide; }
};

using LargeFfmaShape = FfmaShape<8, 3>;
using SmallFfmaShape = FfmaShape<2, 4>;

// The products are summed stage by stage, 16 of them each, and the sums of the stages one after the other:
// the error grows with the number of stages and not with K, as it does in the sums of BLAS libraries
// ("blocked summation", Higham, "Accuracy and Stability of Numerical Algorithms", section 4.2).
//
// sums += of one stage, K ascending.
template <typename Shape>
__device__ inline void multiply_stage(const unsigned char* stage,
                                      float (&sums)[Shape::kThreadRows][Shape::kThreadCols]) {
  // 16 rows further on, the chunks of a row are exchanged alike.
  constexpr int kStep = Shape::kSide * kTileBytes;
  // Not unrolled: the compiler would load ahead more than the registers hold.
#pragma unroll 1
  for (int chunk = 0; chunk < kTileChunks; ++chunk) {
    const unsigned char* const left = stage + tile_offset(Shape::thread_row(), chunk);
    const unsigned char* const right = stage + Shape::kColTile + tile_offset(Shape::thread_col(), chunk);
    float4 b[Shape::kThreadCols];
#pragma unroll
    for (int j = 0; j < Shape::kThreadCols; ++j) b[j] = *reinterpret_cast<const float4*>(right + j * kStep);
#pragma unroll
    for (int i = 0; i < Shape::kThreadRows; ++i) {
      const float4 a = *reinterpret_cast<const float4*>(left + i * kStep);
#pragma unroll
      for (int j = 0; j < Shape::kThreadCols; ++j) sums[i][j] = fmaf(a.x, b[j].x, sums[i][j]);
#pragma unroll
      for (int j = 0; j < Shape::kThreadCols; ++j) sums[i][j] = fmaf(a.y, b[j].y, sums[i][j]);
#pragma unroll
      for (int j = 0; j < Shape::kThreadCols; ++j) sums[i][j] = fmaf(a.z, b[j].z, sums[i][j]);
#pragma unroll
      for (int j = 0; j < Shape::kThreadCols; ++j) sums[i][j] = fmaf(a.w, b[j].w, sums[i][j]);
    }
  }
}

// sums = x * weight^T over all of K, for the tile that begins at these rows of x and weight. arrived(tile,
// columns) may change the part of the weight's tile in shared memory that the thread copied (a TileCopier's
// chunks).
template <typename Shape, bool kAligned, typename Arrived>
__device__ inline void multiply_float32(const Operand& x, int64_t first_row, const Operand& weight,
                                        int64_t first_col, unsigned char* shared,
                                        float (&sums)[Shape::kThreadRows][Shape::kThreadCols],
                                        const Arrived& arrived) {
  const TileCopier<Shape::kRows, Shape::kThreads, kAligned> rows(x, first_row);
  const TileCopier<Shape::kCols, Shape::kThreads, kAligned> cols(weight, first_col);
#pragma unroll
  for (int i = 0; i < Shape::kThreadRows; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kThreadCols; ++j) sums[i][j] = 0.0f;
  run_pipeline<Shape::kStages>(
      tile_count(x),
      [&](int tile, int stage) {
        unsigned char* const to = shared + stage * Shape::kStageBytes;
        rows.copy(tile, to);
        cols.copy(tile, to + Shape::kColTile);
      },
      [&](int tile, int stage) { arrived(tile, shared + stage * Shape::kStageBytes + Shape::kColTile); },
      [&](int, int stage) {
        float of_stage[Shape::kThreadRows][Shape::kThreadCols] = {};
        multiply_stage<Shape>(shared + stage * Shape::kStageBytes, of_stage);
#pragma unroll
        for (int i = 0; i < Shape::kThreadRows; ++i)
#pragma unroll
          for (int j = 0; j < Shape::kThreadCols; ++j) sums[i][j] += of_stage[i][j];
      });
}

}  // namespace dtm_fast
