#include <algorithm>

#include "launch.h"
#include "masked_linear.h"
#include "mma.cuh"

namespace dtm_fast {
namespace {

constexpr int kElementBytes = 2;
constexpr int kTileElements = kTileBytes / kElementBytes;
// Of a mask row, 16 bytes are copied at a time, which serve four tiles. Two such pieces are held: the next
// one is queued when its first tile is, at most kStages - 1 < 4 tiles ahead, while only the one before it is
// in use.
constexpr int kMaskTiles = kChunkBytes * 8 / kTileElements;

// A block applies kMasks masks to one tile of the weight. More masks mean fewer rows, so that the sums still
// fit in the registers.
template <int kMasks, typename MmaShape>
struct MaskedShape : MmaShape {
  static constexpr int kVariants = kMasks;
  static constexpr int kMaskRing =
      MmaShape::kSharedBytes;  // where it begins: [2][kVariants][kCols][16 bytes]
  static constexpr int kMaskBytes = kVariants * MmaShape::kCols * kChunkBytes;
  static constexpr int kSharedBytes = kMaskRing + 2 * kMaskBytes;
  static_assert(MmaShape::kStages - 1 < kMaskTiles, "see kMaskTiles");
  static_assert(MmaShape::kCols <= MmaShape::kThreads, "one thread per mask row");
};

using OneMask = MaskedShape<1, LargeMmaShape>;
using OneMaskSmall = MaskedShape<1, MmaShape<64, 64, 2, 4>>;
using TwoMasks = MaskedShape<2, MmaShape<64, 128, 1, 3>>;
using FourMasks = MaskedShape<4, MmaShape<32, 128, 1, 3>>;

struct MaskRows {
  const uint8_t* mask;
  int64_t row_stride, variant_stride, row_bytes;
  int alignment;  // of all rows: 16, 4 or 1
};

// Queues the copy of 16 bytes of the mask rows of a tile, 0 beyond the edges.
template <typename Shape>
__device__ void copy_masks(const MaskRows& masks, int64_t col, bool has_col, int piece, unsigned char* to) {
  const int64_t left = masks.row_bytes - static_cast<int64_t>(piece) * kChunkBytes;
  const int bytes = !has_col || left <= 0 ? 0 : left < kChunkBytes ? static_cast<int>(left) : kChunkBytes;
  const uint8_t* from = masks.mask + col * masks.row_stride + static_cast<int64_t>(piece) * kChunkBytes;
#pragma unroll 1
  for (int v = 0; v < Shape::kVariants; ++v) {
    const bool is_part = bytes != 0 && bytes != kChunkBytes;  // of which the instructions would read too much
    if (masks.alignment == 1 || is_part) {
      *reinterpret_cast<uint4*>(to) = load_bytes(reinterpret_cast<const char*>(from), bytes);
    } else if (masks.alignment == 16) {
      copy_async_16(shared_address(to), bytes > 0 ? from : masks.mask, bytes);
    } else {
#pragma unroll
      for (int word = 0; word < 4; ++word)
        copy_async_4(shared_address(to) + 4 * word, bytes > 0 ? from + 4 * word : masks.mask, bytes / 4);
    }
    from += masks.variant_stride;
    to += Shape::kCols * kChunkBytes;
  }
}

// A register of the right operand holds two weights of a row; the masks of the four registers of a tile (step
// 0: b0, b1, step 1: b0, b1) come from 32 mask bits as bytes 0 to 3, at bits 2 * (lane % 4) and the next.
// Once shifted to the top of their bytes, a byte permutation that repeats signs (PTX ISA, prmt) makes 16 ones
// of each set bit.
struct ExpandedMask {
  uint32_t low, high;  // the lower and the upper weight of each register

  __device__ ExpandedMask(uint32_t bits, int in_quad)
      : low(bits << (7 - 2 * in_quad)), high(bits << (6 - 2 * in_quad)) {}
  __device__ uint32_t of(int reg) const {
    return permute_bytes(low, high, 0xcc88u + 0x1111u * static_cast<uint32_t>(reg));
  }
};

struct AddBias {
  const float* bias;

  struct Row {};
  using Column = float;
  __device__ Row row(int64_t) const { return {}; }
  __device__ Column column(int64_t n) const { return bias != nullptr ? bias[n] : 0.0f; }
  __device__ float value(float sum, Row, Column bias_of_column) const { return sum + bias_of_column; }
};

template <typename Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    masked_mma_kernel(const MaskedLinear args, int mask_alignment, int row_tiles, int col_tiles, bool wide) {
  extern __shared__ __align__(128) unsigned char shared[];
  // Blocks of one tile and different masks follow each other: they read the same x and weight.
  const int64_t groups = args.V / Shape::kVariants;
  const int64_t first_variant = blockIdx.x % groups * Shape::kVariants;
  const TilePlace place = place_of_tile(blockIdx.x / groups, row_tiles, col_tiles);
  const int64_t first_row = static_cast<int64_t>(place.row) * Shape::kRows;
  const int64_t first_col = static_cast<int64_t>(place.col) * Shape::kCols;
  const Operand x = {static_cast<const char*>(args.x), args.x_stride * kElementBytes, args.M,
                     args.K * kElementBytes};
  const Operand weight = {static_cast<const char*>(args.weight), args.weight_stride * kElementBytes, args.N,
                          args.K * kElementBytes};
  const MaskRows masks = {args.mask + first_variant * args.mask_variant_stride, args.mask_row_stride,
                          args.mask_variant_stride, tiles_of(args.K, 8), mask_alignment};
  const TileCopier<Shape::kRows, Shape::kThreads, kAligned> rows(x, first_row);
  const TileCopier<Shape::kCols, Shape::kThreads, kAligned> cols(weight, first_col);
  const Fragments<Shape> fragments;
  const int thread = static_cast<int>(threadIdx.x), lane = Shape::lane(), in_quad = lane % 4;
  // Of this lane's column of the right operand's first fragment.
  const uint32_t mask_offset =
      static_cast<uint32_t>(Shape::kMaskRing + (Shape::warp_col() + lane / 4) * kChunkBytes);

  float sums[Shape::kVariants][Shape::kRowFragments][Shape::kColFragments][4] = {};
  run_pipeline<Shape::kStages>(
      tile_count(x),
      [&](int tile, int stage) {
        unsigned char* const to = shared + stage * Shape::kStageBytes;
        rows.copy(tile, to);
        cols.copy(tile, to + Shape::kColTile);
        if (tile % kMaskTiles == 0 && thread < Shape::kCols) {
          const int piece = tile / kMaskTiles;
          copy_masks<Shape>(masks, first_col + thread, first_col + thread < args.N, piece,
                            shared + Shape::kMaskRing + piece % 2 * Shape::kMaskBytes + thread * kChunkBytes);
        }
      },
      [](int, int) {},
      [&](int tile, int stage) {
        const uint32_t from = shared_address(shared) + stage * Shape::kStageBytes;
        const unsigned char* const mask_words =
            shared + mask_offset + tile / kMaskTiles % 2 * Shape::kMaskBytes + tile % kMaskTiles * 4;
        uint32_t words[Shape::kVariants][Shape::kColFragments];
#pragma unroll
        for (int v = 0; v < Shape::kVariants; ++v)
#pragma unroll
          for (int j = 0; j < Shape::kColFragments; ++j)
            words[v][j] =
                *reinterpret_cast<const uint32_t*>(mask_words + (v * Shape::kCols + j * 8) * kChunkBytes);
#pragma unroll
        for (int step = 0; step < kTileSteps; ++step) {
          uint32_t a[Shape::kRowFragments][4], b[Shape::kColFragments][2];
          fragments.load_left(from, step, a);
          fragments.load_right(from, step, b);
#pragma unroll
          for (int v = 0; v < Shape::kVariants; ++v)
#pragma unroll
            for (int j = 0; j < Shape::kColFragments; ++j) {
              const ExpandedMask mask(words[v][j], in_quad);
              const uint32_t kept[2] = {b[j][0] & mask.of(2 * step), b[j][1] & mask.of(2 * step + 1)};
#pragma unroll
              for (int i = 0; i < Shape::kRowFragments; ++i) multiply_fragments(sums[v][i][j], a[i], kept);
            }
        }
      });
#pragma unroll
  for (int v = 0; v < Shape::kVariants; ++v) {
    uint16_t* const y = static_cast<uint16_t*>(args.y) + (first_variant + v) * args.M * args.N;
    store_sums(sums[v], {FloatType::kBfloat16, y, args.M, args.N, wide}, first_row + Shape::warp_row(),
               first_col + Shape::warp_col(), AddBias{args.bias});
  }
}

template <typename Shape, bool kAligned>
void launch(const MaskedLinear& args, CUstream_st* stream) {
  const auto aligned_to = [&](int bytes) {
    return is_aligned(args.mask, args.mask_row_stride, args.N, bytes) &&
           (args.V == 1 || args.mask_variant_stride % bytes == 0);
  };
  const int mask_alignment = aligned_to(16) ? 16 : aligned_to(4) ? 4 : 1;
  const int row_tiles = static_cast<int>(tiles_of(args.M, Shape::kRows));
  const int col_tiles = static_cast<int>(tiles_of(args.N, Shape::kCols));
  // y of every mask is as aligned as the first, or the pairs of columns are not.
  const bool wide = wide_results(args.y, FloatType::kBfloat16, args.N);
  const auto kernel = masked_mma_kernel<Shape, kAligned>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes),
             "masked_linear");
  const auto blocks = static_cast<unsigned>(args.V / Shape::kVariants * row_tiles * col_tiles);
  kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, stream>>>(args, mask_alignment, row_tiles, col_tiles,
                                                                   wide);
  check_cuda(cudaGetLastError(), "masked_linear");
}

// The masks from `first` on, as many as whole groups of the shape hold; returns the first that is left.
template <typename Shape>
int64_t run_masks(const MaskedLinear& all, int64_t first, CUstream_st* stream) {
  const int64_t variants = (all.V - first) / Shape::kVariants * Shape::kVariants;
  if (variants == 0) return first;
  MaskedLinear args = all;
  args.V = variants;
  args.mask += first * all.mask_variant_stride;
  args.y = static_cast<uint16_t*>(all.y) + first * all.M * all.N;
  const bool aligned = is_aligned(args.x, args.x_stride * kElementBytes, args.M, kChunkBytes) &&
                       is_aligned(args.weight, args.weight_stride * kElementBytes, args.N, kChunkBytes);
  aligned ? launch<Shape, true>(args, stream) : launch<Shape, false>(args, stream);
  return first + variants;
}

}  // namespace

void masked_mma(const MaskedLinear& args, CUstream_st* stream) {
  if (args.V == 0 || args.M == 0 || args.N == 0) return;
  int64_t first = run_masks<FourMasks>(args, 0, stream);
  first = run_masks<TwoMasks>(args, first, stream);
  const int64_t large_tiles = tiles_of(args.M, OneMask::kRows) * tiles_of(args.N, OneMask::kCols);
  args.M > OneMaskSmall::kRows&& large_tiles >= multiprocessors()
      ? run_masks<OneMask>(args, first, stream)
      : run_masks<OneMaskSmall>(args, first, stream);
}

}  // namespace dtm_fast
