#include <cuda_bf16.h>

#include <cstdint>

#include "hopper.cuh"
#include "hopper_launch.h"
#include "launch.h"
#include "tensor_map.h"
#include "token_divergence.h"

namespace dtm_fast {
namespace {

constexpr int kVocabularyTile = 256;
static_assert(kVocabularyTile >= kSmallestVocabularyTile, "summaries has room");

using LogitRing = hopper::Ring<kVocabularyTile, 4>;

struct Rows {
  const int64_t* reference;
  LogitSummary* summaries;
  float* own_logit;
  int T, V;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kPairs = kVocabularyTile / 8;  // pairs of neighbouring logits of one row in a thread

__device__ __forceinline__ float low(__nv_bfloat162 pair) {
  return __uint_as_float(*reinterpret_cast<const uint32_t*>(&pair) << 16);
}
__device__ __forceinline__ float high(__nv_bfloat162 pair) {
  return __uint_as_float(*reinterpret_cast<const uint32_t*>(&pair) & 0xffff0000u);
}

// NaN if one is.
__device__ __forceinline__ float larger(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// 0 for denormal terms, which nobody misses; to honour them takes three instructions more.
__device__ __forceinline__ float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a quad holds of one row: pair j of a thread are columns 8j + 2 * (lane mod 4) and the next.
// Every thread of the quad returns the same; argmax is a column.
__device__ __forceinline__ LogitSummary summarize(const __nv_bfloat162 (&logits)[kPairs]) {
  const int quad = threadIdx.x % 4;
  __nv_bfloat162 most = logits[0];
#pragma unroll
  for (int j = 1; j < kPairs; ++j) most = __hmax2_nan(most, logits[j]);
  float max = larger(low(most), high(most));
  max = larger(max, __shfl_xor_sync(~0u, max, 1));
  max = larger(max, __shfl_xor_sync(~0u, max, 2));

  // Where all is -infinity, the terms are 0 and not NaN.
  const float shift = max == -INFINITY ? 0.0f : max;
  constexpr float kLog2E = 1.4426950408889634f;
  float sum_low = 0.0f, sum_high = 0.0f;
  int argmax = INT32_MAX;
#pragma unroll
  for (int j = kPairs - 1; j >= 0; --j) {  // downwards: the lowest column is the last to be written
    const float b = high(logits[j]), a = low(logits[j]);
    sum_high += exp2_approximately((b - shift) * kLog2E);
    sum_low += exp2_approximately((a - shift) * kLog2E);
    if (b == max) argmax = 8 * j + 1;
    if (a == max) argmax = 8 * j;
  }
  if (max != max) {
#pragma unroll
    for (int j = kPairs - 1; j >= 0; --j) {
      const float b = high(logits[j]), a = low(logits[j]);
      if (b != b) argmax = 8 * j + 1;
      if (a != a) argmax = 8 * j;
    }
  }
  if (argmax != INT32_MAX) argmax += 2 * quad;
  argmax = min(argmax, __shfl_xor_sync(~0u, argmax, 1));
  argmax = min(argmax, __shfl_xor_sync(~0u, argmax, 2));
  float sum = sum_low + sum_high;
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  return {max, sum, argmax};
}

// The logit of this column, if it is this thread that holds it, into own.
__device__ __forceinline__ void pick(const __nv_bfloat162 (&logits)[kPairs], int column, float* own) {
  const int quad = threadIdx.x % 4;
  if (column < 0 || column >= kVocabularyTile || column % 8 / 2 != quad) return;
  float logit = 0.0f;
#pragma unroll
  for (int i = 0; i < kVocabularyTile / 4;
       ++i) {  // no index at run time: that takes the array out of registers
    const float candidate = i % 2 == 0 ? low(logits[i / 2]) : high(logits[i / 2]);
    if (column == 8 * (i / 2) + 2 * quad + i % 2) logit = candidate;
  }
  *own = logit;
}

#endif

// A is hidden, B is lm_head. Persistent: while the multiplying warpgroups look at a tile's logits, the copies
// for the next go on, and the warpgroup that is behind has the tensor cores for itself.
__global__ void __launch_bounds__(hopper::kThreads, 1)
    divergence_hopper_kernel(const __grid_constant__ CUtensorMap map_hidden,
                             const __grid_constant__ CUtensorMap map_lm_head, const hopper::TileOrder order,
                             const int steps, const Rows rows) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using R = LogitRing;
  extern __shared__ uint8_t shared[];
  const R ring(shared);
  const int rank = hopper::cluster_rank();
  const int first = blockIdx.x / order.blocks, stride = gridDim.x / order.blocks;
  if (threadIdx.x == 0) {
    hopper::prefetch_tensor_map(map_hidden);
    hopper::prefetch_tensor_map(map_lm_head);
  }
  ring.start(order.blocks);

  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
  hopper::Position position;
  if (group < 0) {
    hopper::lower_registers<hopper::kLoadRegisters>();
    if (threadIdx.x == 0) {
      for (int index = first; index < order.count(); index += stride) {
        int tile_t, tile_v;
        order.at(index, rank, tile_t, tile_v);
        for (int step = 0; step < steps; ++step) {
          ring.load(position, map_hidden, map_lm_head, step * (hopper::kRowBytes / 2),
                    tile_t * hopper::kRowsA, tile_v * kVocabularyTile, order.blocks, rank);
          R::advance(position);
        }
      }
    }
  } else {
    hopper::raise_registers<hopper::kMultiplyRegisters>();
    const int lane = threadIdx.x % 32, quad = lane % 4;
    for (int index = first; index < order.count(); index += stride) {
      int tile_t, tile_v;
      order.at(index, rank, tile_t, tile_v);
      const int t0 = tile_t * hopper::kRowsA + 64 * group + 16 * (threadIdx.x % 128 / 32) + lane / 4;
      const int v0 = tile_v * kVocabularyTile;
      int own_column[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        own_column[half] = static_cast<int>(rows.reference[min(t0 + 8 * half, rows.T - 1)]) - v0;

      float sums[kVocabularyTile / 2];
      hopper::multiply(ring, position, steps, group, order.blocks, sums);

      if (rows.V - v0 < kVocabularyTile) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (8 * j + 2 * quad + i % 2 >= rows.V - v0) sums[4 * j + i] = -INFINITY;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = t0 + 8 * half;
        __nv_bfloat162 logits[kPairs];
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
          logits[j] = __floats2bfloat162_rn(sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]);
        LogitSummary summary = summarize(logits);
        summary.argmax += v0;
        if (t >= rows.T) continue;
        if (quad == 0) rows.summaries[static_cast<int64_t>(tile_v) * rows.T + t] = summary;
        pick(logits, own_column[half], rows.own_logit + t);
      }
    }
  }
  hopper::cluster_sync();  // a block stays while the other may write to its shared memory
#endif
}

}  // namespace

bool divergence_hopper_possible(const TokenDivergence& args) {
  constexpr int64_t kMostTiles = int64_t{1} << 30;
  return args.type == FloatType::kBfloat16 && compute_capability() == 90 &&
         tensor_map_possible(args.hidden, args.T, args.D, 2 * args.hidden_stride, 2) &&
         tensor_map_possible(args.lm_head, args.V, args.D, 2 * args.lm_head_stride, 2) &&
         (args.T / hopper::kRowsA + 2) * (args.V / kVocabularyTile + 1) < kMostTiles;
}

int64_t divergence_hopper(const TokenDivergence& args, CUstream_st* stream) {
  const int64_t tiles_t = (args.T + hopper::kRowsA - 1) / hopper::kRowsA;
  const int64_t tiles_v = (args.V + kVocabularyTile - 1) / kVocabularyTile;
  hopper::TileOrder order;
  order.blocks = cluster_blocks(tiles_t);
  order.rows_a = static_cast<int>((tiles_t + order.blocks - 1) / order.blocks);
  order.rows_b = static_cast<int>(tiles_v);
  const CUtensorMap map_hidden = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.hidden, args.T, args.D,
                                            2 * args.hidden_stride, 2, hopper::kRowsA);
  const CUtensorMap map_lm_head = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.lm_head, args.V, args.D,
                                             2 * args.lm_head_stride, 2, kVocabularyTile / order.blocks);
  Rows rows;
  rows.reference = args.reference;
  rows.summaries = args.summaries;
  rows.own_logit = args.own_logit;
  rows.T = static_cast<int>(args.T);
  rows.V = static_cast<int>(args.V);
  const int steps = static_cast<int>((2 * args.D + hopper::kRowBytes - 1) / hopper::kRowBytes);
  launch_clusters(divergence_hopper_kernel, "token_divergence", order.blocks,
                  int64_t{order.rows_a} * order.rows_b, hopper::kThreads, LogitRing::kSharedBytes,
                  LogitRing::kSharedBytes, /*early=*/false, stream, map_hidden, map_lm_head, order, steps,
                  rows);
  return kVocabularyTile;
}

}  // namespace dtm_fast
