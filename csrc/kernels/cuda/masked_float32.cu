#include "ffma_tile.cuh"
#include "launch.h"
#include "masked_linear.h"

namespace dtm_fast {
namespace {

constexpr int kElementBytes = 4;

// Zeroes what the mask leaves out of the chunks of 4 weights that this thread copied to shared memory. The
// bits of a tile are read while the one before it is multiplied.
template <typename Shape>
class MaskChunks {
 public:
  using Copier = TileCopier<Shape::kCols, Shape::kThreads, true>;

  __device__ MaskChunks(const uint8_t* mask, int64_t row_stride, const Operand& weight, int64_t first_col)
      : chunks_(weight, first_col),
        mask_(mask + (first_col + chunks_.row(0)) * row_stride + chunks_.chunk() / 2),
        step_(Copier::kRowStep * row_stride),
        tiles_(static_cast<int>(
            tiles_of(tiles_of(weight.row_bytes / kElementBytes, 8) - chunks_.chunk() / 2, kTileMaskBytes))) {
    read(0);
  }

  __device__ void apply(int tile, unsigned char* columns) {
#pragma unroll
    for (int i = 0; i < Copier::kCopies; ++i) {
      float4* const chunk = reinterpret_cast<float4*>(columns + chunks_.offset(i));
      const uint32_t bits = bits_[i] >> (chunks_.chunk() % 2 * 4);
      float4 weights = *chunk;
      weights.x = (bits & 1) != 0 ? weights.x : 0.0f;
      weights.y = (bits & 2) != 0 ? weights.y : 0.0f;
      weights.z = (bits & 4) != 0 ? weights.z : 0.0f;
      weights.w = (bits & 8) != 0 ? weights.w : 0.0f;
      *chunk = weights;
    }
    read(tile + 1);
  }

 private:
  static constexpr int kTileMaskBytes = kTileBytes / kElementBytes / 8;

  __device__ void read(int tile) {
    const int64_t byte = static_cast<int64_t>(tile) * kTileMaskBytes;
#pragma unroll
    for (int i = 0; i < Copier::kCopies; ++i)
      bits_[i] = chunks_.has_row(i) && tile < tiles_ ? mask_[i * step_ + byte] : 0u;
  }

  Copier chunks_;  // only to know which they are
  const uint8_t* mask_;
  int64_t step_;
  int tiles_;  // that have a byte of this thread's
  uint32_t bits_[Copier::kCopies];
};

template <typename Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    masked_float32_kernel(const MaskedLinear args, int row_tiles, int col_tiles) {
  extern __shared__ __align__(128) unsigned char shared[];
  // Blocks of one tile and different masks follow each other: they read the same x and weight.
  const int v = static_cast<int>(blockIdx.x % args.V);
  const TilePlace place = place_of_tile(blockIdx.x / args.V, row_tiles, col_tiles);
  const int64_t first_row = static_cast<int64_t>(place.row) * Shape::kRows;
  const int64_t first_col = static_cast<int64_t>(place.col) * Shape::kCols;
  const Operand x = {static_cast<const char*>(args.x), args.x_stride * kElementBytes, args.M,
                     args.K * kElementBytes};
  const Operand weight = {static_cast<const char*>(args.weight), args.weight_stride * kElementBytes, args.N,
                          args.K * kElementBytes};
  MaskChunks<Shape> mask(args.mask + v * args.mask_variant_stride, args.mask_row_stride, weight, first_col);
  float sums[Shape::kThreadRows][Shape::kThreadCols];
  multiply_float32<Shape, kAligned>(x, first_row, weight, first_col, shared, sums,
                                    [&](int tile, unsigned char* columns) { mask.apply(tile, columns); });
  float* const y = static_cast<float*>(args.y) + v * args.M * args.N;
#pragma unroll
  for (int j = 0; j < Shape::kThreadCols; ++j) {
    const int64_t n = first_col + Shape::thread_col() + j * Shape::kSide;
    if (n >= args.N) continue;
    const float bias = args.bias != nullptr ? args.bias[n] : 0.0f;
#pragma unroll
    for (int i = 0; i < Shape::kThreadRows; ++i) {
      const int64_t m = first_row + Shape::thread_row() + i * Shape::kSide;
      if (m < args.M) y[m * args.N + n] = sums[i][j] + bias;
    }
  }
}

template <typename Shape>
void launch(const MaskedLinear& args, CUstream_st* stream) {
  const bool aligned = is_aligned(args.x, args.x_stride * kElementBytes, args.M, kChunkBytes) &&
                       is_aligned(args.weight, args.weight_stride * kElementBytes, args.N, kChunkBytes);
  const int row_tiles = static_cast<int>(tiles_of(args.M, Shape::kRows));
  const int col_tiles = static_cast<int>(tiles_of(args.N, Shape::kCols));
  const auto kernel = aligned ? masked_float32_kernel<Shape, true> : masked_float32_kernel<Shape, false>;
  const auto blocks = static_cast<unsigned>(args.V * row_tiles * col_tiles);
  kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, stream>>>(args, row_tiles, col_tiles);
  check_cuda(cudaGetLastError(), "masked_linear");
}

}  // namespace

void masked_float32(const MaskedLinear& args, CUstream_st* stream) {
  if (args.V == 0 || args.M == 0 || args.N == 0) return;
  const int64_t large_tiles =
      args.V * tiles_of(args.M, LargeFfmaShape::kRows) * tiles_of(args.N, LargeFfmaShape::kCols);
  args.M > SmallFfmaShape::kRows&& large_tiles >= multiprocessors() ? launch<LargeFfmaShape>(args, stream)
                                                                    : launch<SmallFfmaShape>(args, stream);
}

}  // namespace dtm_fast
