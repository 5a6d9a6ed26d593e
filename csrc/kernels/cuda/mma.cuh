// A tile of a product on the tensor cores (mma.sync), for int8 and bfloat16: shapes, fragments, stores.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../cpu/float_type.h"
#include "mma_ptx.cuh"
#include "tile_copy.cuh"

namespace dtm_fast {

// Four warps share a tile of kRows x kCols sums, as kRowWarps x 4 / kRowWarps. In shared memory a stage is a
// tile of the rows, then one of the columns.
template <int kRowsOfTile, int kColsOfTile, int kRowWarps, int kPipelineStages>
struct MmaShape {
  static constexpr int kRows = kRowsOfTile, kCols = kColsOfTile, kStages = kPipelineStages;
  static constexpr int kThreads = 128;
  static constexpr int kColWarps = 4 / kRowWarps;
  static constexpr int kWarpRows = kRows / kRowWarps, kWarpCols = kCols / kColWarps;
  static constexpr int kRowFragments = kWarpRows / 16, kColFragments = kWarpCols / 8;
  static constexpr int kColTile = kRows * kTileBytes;  // where it begins in a stage
  static constexpr int kStageBytes = (kRows + kCols) * kTileBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kColFragments % 4 == 0, "stores take four fragments at a time");

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp_row() { return warp() / kColWarps * kWarpRows; }
  __device__ static int warp_col() { return warp() % kColWarps * kWarpCols; }
};

// Of a thread's registers 128 hold sums, so that two blocks fit into a multiprocessor; so do three stages,
// twice, into the 100 KB of the smaller GPUs.
using LargeMmaShape = MmaShape<128, 128, 2, 3>;
// For few rows or columns: more blocks, and more copies under way in each.
using SmallMmaShape = MmaShape<64, 64, 2, 6>;

// The addresses that a lane gives to ldmatrix for 16 rows x 32 bytes; of the left operand, the matrices are
// ordered as registers a0 ... a3 of mma, of the right one as b0 and b1 of two fragments of 8 columns.
__host__ __device__ constexpr uint32_t left_lane_offset(int first_row, int lane) {
  return tile_offset(first_row + lane % 16, lane / 16);
}
__host__ __device__ constexpr uint32_t right_lane_offset(int first_col, int lane) {
  return tile_offset(first_col + lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
// The second 32 bytes of the tile's rows: chunks 2 and 3 instead of 0 and 1, which the exchange keeps pairs
// of.
constexpr int kTileSteps = kTileBytes / 32;
__host__ __device__ constexpr uint32_t step_offset(uint32_t lane_offset, int step) {
  return lane_offset ^ static_cast<uint32_t>(step * 32);
}

template <typename Shape>
class Fragments {
 public:
  __device__ Fragments()
      : left_(left_lane_offset(Shape::warp_row(), Shape::lane())),
        right_(Shape::kColTile + right_lane_offset(Shape::warp_col(), Shape::lane())) {}

  __device__ void load_left(uint32_t stage, int step, uint32_t (&a)[Shape::kRowFragments][4]) const {
#pragma unroll
    for (int i = 0; i < Shape::kRowFragments; ++i)
      load_matrices(a[i], stage + step_offset(left_, step) + i * 16 * kTileBytes);
  }
  __device__ void load_right(uint32_t stage, int step, uint32_t (&b)[Shape::kColFragments][2]) const {
#pragma unroll
    for (int j = 0; j < Shape::kColFragments; j += 2) {
      uint32_t pair[4];
      load_matrices(pair, stage + step_offset(right_, step) + j * 8 * kTileBytes);
      b[j][0] = pair[0];
      b[j][1] = pair[1];
      b[j + 1][0] = pair[2];
      b[j + 1][1] = pair[3];
    }
  }

 private:
  uint32_t left_, right_;
};

// sums = x * weight^T over all of K, for the tile that begins at these rows of x and weight. Lane l of a warp
// has in sums[i][j] the rows l / 4 and l / 4 + 8 of fragment i, and of each the columns l % 4 * 2 and the
// next of fragment j.
template <typename Shape, bool kAlignedRows, bool kAlignedCols, typename Sum>
__device__ inline void multiply_tile(const Operand& x, int64_t first_row, const Operand& weight,
                                     int64_t first_col, unsigned char* shared,
                                     Sum (&sums)[Shape::kRowFragments][Shape::kColFragments][4]) {
  const TileCopier<Shape::kRows, Shape::kThreads, kAlignedRows> rows(x, first_row);
  const TileCopier<Shape::kCols, Shape::kThreads, kAlignedCols> cols(weight, first_col);
  const Fragments<Shape> fragments;
#pragma unroll
  for (int i = 0; i < Shape::kRowFragments; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kColFragments; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
  run_pipeline<Shape::kStages>(
      tile_count(x),
      [&](int tile, int stage) {
        unsigned char* const to = shared + stage * Shape::kStageBytes;
        rows.copy(tile, to);
        cols.copy(tile, to + Shape::kColTile);
      },
      [](int, int) {},
      [&](int, int stage) {
        const uint32_t from = shared_address(shared) + stage * Shape::kStageBytes;
#pragma unroll
        for (int step = 0; step < kTileSteps; ++step) {
          uint32_t a[Shape::kRowFragments][4], b[Shape::kColFragments][2];
          fragments.load_left(from, step, a);
          fragments.load_right(from, step, b);
#pragma unroll
          for (int i = 0; i < Shape::kRowFragments; ++i)
#pragma unroll
            for (int j = 0; j < Shape::kColFragments; ++j) multiply_fragments(sums[i][j], a[i], b[j]);
        }
      });
}

// Exchanges word j of lane i of four lanes for word i of lane j.
__device__ inline void transpose_in_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; ++distance) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      uint32_t& low = words[i];
      uint32_t& high = words[i + distance];
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
      if (upper)
        low = received;
      else
        high = received;
    }
  }
}

// A contiguous matrix of results. wide: pairs of columns may be stored as float2, eight as 16 bytes of
// bfloat16.
struct Results {
  FloatType type;
  void* data;
  int64_t rows, cols;
  bool wide;
};

inline bool wide_results(const void* data, FloatType type, int64_t cols) {
  return type == FloatType::kFloat32 ? is_aligned(data, cols * 4, 2, 8) : is_aligned(data, cols * 2, 2, 16);
}

// Stores finish.value(sum, finish.row(row), finish.column(column)) for every sum of the warp's tile. The sums
// of four fragments are exchanged between lanes until a lane has 8 neighbours of bfloat16: 64 contiguous
// bytes per row.
template <int kRowFragments, int kColFragments, typename Sum, typename Finish>
__device__ inline void store_sums(const Sum (&sums)[kRowFragments][kColFragments][4], const Results& out,
                                  int64_t first_row, int64_t first_col, const Finish& finish) {
  const int lane = static_cast<int>(threadIdx.x) % 32, in_quad = lane % 4;
#pragma unroll
  for (int j0 = 0; j0 < kColFragments; j0 += 4) {
    typename Finish::Column columns[8] = {};
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int64_t col = first_col + (j0 + c / 2) * 8 + in_quad * 2 + c % 2;
      if (col < out.cols) columns[c] = finish.column(col);
    }
#pragma unroll
    for (int half_fragment = 0; half_fragment < 2 * kRowFragments; ++half_fragment) {
      const int i = half_fragment / 2, half = half_fragment % 2;
      const int64_t row = first_row + i * 16 + half * 8 + lane / 4;
      const bool has_row = row < out.rows;
      typename Finish::Row of_row = {};
      if (has_row) of_row = finish.row(row);
      float values[8];
#pragma unroll
      for (int c = 0; c < 8; ++c)
        values[c] = finish.value(sums[i][j0 + c / 2][half * 2 + c % 2], of_row, columns[c]);
      if (out.type == FloatType::kBfloat16) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = bfloat16_pair(values[2 * j], values[2 * j + 1]);
        if (out.wide) {
          transpose_in_quad(words, lane);
          const int64_t col = first_col + (j0 + in_quad) * 8;
          if (has_row && col < out.cols)
            *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out.data) + row * out.cols + col) =
                make_uint4(words[0], words[1], words[2], words[3]);
          continue;
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const int64_t col = first_col + (j0 + c / 2) * 8 + in_quad * 2 + c % 2;
          if (has_row && col < out.cols)
            static_cast<uint16_t*>(out.data)[row * out.cols + col] =
                static_cast<uint16_t>(words[c / 2] >> (16 * (c % 2)));
        }
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t col = first_col + (j0 + j) * 8 + in_quad * 2;
        float* const to = static_cast<float*>(out.data) + row * out.cols + col;
        if (has_row && out.wide && col < out.cols) {
          *reinterpret_cast<float2*>(to) = make_float2(values[2 * j], values[2 * j + 1]);
        } else if (has_row) {
          if (col < out.cols) to[0] = values[2 * j];
          if (col + 1 < out.cols) to[1] = values[2 * j + 1];
        }
      }
    }
  }
}

}  // namespace dtm_fast
