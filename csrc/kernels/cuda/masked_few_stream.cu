#include <algorithm>
#include <stdexcept>

#include "few_stream.cuh"
#include "hopper_launch.h"
#include "masked_linear.h"
#include "tensor_map.h"

namespace dtm_fast {
namespace {

using namespace few_tokens;
using few_stream::kThreads;
using few_stream::kWarps;
using few_stream::Maps;
using few_stream::Plan;

// Two lines, 128 weights of a row, to which 16 bytes of each mask belong.
template <int kVariants, int kTokenTiles>
using Shape = few_stream::Shape<2, kVariants, kTokenTiles>;

constexpr int kSharedLimit = 227 * 1024;  // what a block may have
constexpr int kLeastStages = 2;           // 64 KiB

template <int kVariants, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    masked_few_stream_kernel(const __grid_constant__ Maps maps, const Plan plan, const MaskedLinear args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<kVariants, kTokenTiles>;
  extern __shared__ uint8_t shared[];
  few_stream::Stream<S> stream(shared, maps, plan, few_stream::kLineBytes / 2);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const int M = static_cast<int>(args.M), V = static_cast<int>(args.V);
  // Nothing at all is read before the wait: the kernel in front may be anybody's. The next one may begin
  // where a block of this one ends.
  stream.make_barriers();
  wait_for_grid();
  let_next_grid_begin();
  // A few tokens are soon here. Many, which all blocks read at once from L2, must not stand before the
  // weight.
  if constexpr (kTokenTiles == 1) stream.load_tokens(M);
  stream.fill_all();
  if constexpr (kTokenTiles > 1) stream.load_tokens(M);
  const int my_row = threadIdx.x % kRowTile, my_token = threadIdx.x / kRowTile;  // of a tile's results
  float* const all_sums = reinterpret_cast<float*>(stream.sums);

#pragma unroll 1
  for (int chunk = 0; chunk < plan.chunks; ++chunk) {
    stream.enter(chunk);
    stream.wait_for_tokens();
#pragma unroll 1
    for (int tile = 0; tile < stream.tiles; ++tile) {
      const bool replaces = tile + 1 == stream.tiles && !stream.is_last_chunk();
      const int n = stream.first_row + tile * kRowTile + my_row;
      const bool mine = my_token < M && n < stream.end_row && n < args.N;
      const float bias = mine && args.bias != nullptr ? few_stream::load_early(args.bias + n) : 0.0f;

      float sums[kVariants][kTokenTiles][4] = {};
#pragma unroll 1
      for (int unit = 0; unit < stream.units; ++unit) {
        stream.wait();
#pragma unroll
        for (int line = 0; line < S::kLines; ++line) {
          uint32_t mask[kVariants][2];  // of rows g and g + 8
#pragma unroll
          for (int v = 0; v < kVariants; ++v)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              mask[v][half] =
                  few_stream::load_pair(stream.mask_pair(v, line) + half * 8 * few_stream::kMaskBytes);
          const uint32_t weight_chunk = stream.weight_chunk(line);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint4 w[2], x[kTokenTiles];
#pragma unroll
            for (int half = 0; half < 2; ++half)
              w[half] =
                  few_stream::load_chunk((weight_chunk ^ (16 * i)) + half * (few_stream::kTileBytes / 2));
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
              const int token = g + kTokenTile * j;
              const uint32_t address = stream.token_chunk(unit, line, token, M) ^ (16 * i);
              x[j] = token < M ? few_stream::load_chunk(address) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int v = 0; v < kVariants; ++v) {
              const uint4 low = keep(w[0], (mask[v][0] >> (8 * i)) & 255);
              const uint4 high = keep(w[1], (mask[v][1] >> (8 * i)) & 255);
#pragma unroll
              for (int j = 0; j < kTokenTiles; ++j) {
                mma_bfloat16(sums[v][j], low.x, high.x, low.y, high.y, x[j].x, x[j].y);
                mma_bfloat16(sums[v][j], low.z, high.z, low.w, high.w, x[j].z, x[j].w);
              }
            }
          }
        }
        stream.next();
        if (replaces) stream.replace_tokens(unit, M);
      }

#pragma unroll
      for (int v = 0; v < kVariants; ++v) {
        if (v >= V) break;
        __syncthreads();  // the sums before are read
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j)
          put_sums<kRowTile>(all_sums + warp * S::kSums, sums[v][j], 0, kTokenTile * j, lane);
        __syncthreads();
        if (mine) {
          float sum = 0;
#pragma unroll
          for (int w = 0; w < kWarps; ++w)
            sum = __fadd_rn(sum, all_sums[w * S::kSums + my_token * kSumStride<kRowTile> + my_row]);
          float& partial =
              reinterpret_cast<float*>(stream.partials)[(v * stream.tiles + tile) * kThreads + threadIdx.x];
          if (chunk > 0) sum = __fadd_rn(partial, sum);
          if (!stream.is_last_chunk()) {
            partial = sum;
            continue;
          }
          if (args.bias != nullptr) sum = __fadd_rn(sum, bias);
          store(static_cast<uint16_t*>(args.y) + (v * args.M + my_token) * args.N + n, sum);
        }
      }
    }
  }
#endif
}

// They depend on K alone, for the order of a sum not to depend on anything else: as few as leave room for the
// ring beside the most tokens.
int chunks_of(int64_t K) {
  for (int chunks = 1; chunks <= few_stream::kMostChunks; ++chunks) {
    const Plan plan = few_stream::make_plan<Shape<1, 2>>(kMostTokens, 1, K * 2, kSharedLimit, chunks);
    if (plan.stages >= (chunks == 1 ? kLeastStages : kLeastStages + 1)) return chunks;
  }
  return 1;
}

template <int kVariants, int kTokenTiles>
Plan plan_of(const MaskedLinear& args) {
  return few_stream::make_plan<Shape<kVariants, kTokenTiles>>(args.M, args.N, args.K * 2, kSharedLimit,
                                                              chunks_of(args.K));
}

// Bytes of a row, rows, masks: of 16 bytes, 16 rows and all masks a stage is filled.
template <int kVariants>
CUtensorMap mask_map(const MaskedLinear& args) {
  const int64_t variant_stride = args.V == 1 ? args.mask_row_stride * args.N : args.mask_variant_stride;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>((args.K + 7) / 8), static_cast<cuuint64_t>(args.N),
                              static_cast<cuuint64_t>(args.V)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(args.mask_row_stride),
                                static_cast<cuuint64_t>(variant_stride)};
  const cuuint32_t box[] = {few_stream::kMaskBytes, kRowTile, kVariants};
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<uint8_t*>(args.mask), sizes,
                           strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  return map;
}

template <int kVariants, int kTokenTiles>
void launch(const MaskedLinear& args, CUstream_st* stream) {
  const auto map = [&](const void* matrix, int64_t rows, int64_t row_stride, int box_rows) {
    return tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, matrix, rows, args.K, row_stride * 2, 2, box_rows);
  };
  Maps maps = {};
  maps.tile = map(args.weight, args.N, args.weight_stride, kRowTile);
  maps.group = map(args.weight, args.N, args.weight_stride, few_stream::kGroup);
  maps.tokens = map(args.x, args.M, args.x_stride, static_cast<int>(args.M));
  maps.masks = mask_map<kVariants>(args);
  const Plan plan = plan_of<kVariants, kTokenTiles>(args);
  launch_clusters(masked_few_stream_kernel<kVariants, kTokenTiles>, "masked_linear", 1, plan.groups, kThreads,
                  plan.shared_bytes, kSharedLimit, /*early=*/true, stream, maps, plan, args);
}

// The kernel for the masks of the next pass over the weight: as many as there are, as shared memory has room
// for, and as one tensor map can describe.
template <int kTokenTiles>
void run_passes(const MaskedLinear& args, CUstream_st* stream) {
  const auto fits = [](const Plan& plan) { return plan.stages >= kLeastStages; };
  int64_t most = fits(plan_of<8, kTokenTiles>(args))   ? 8
                 : fits(plan_of<4, kTokenTiles>(args)) ? 4
                 : fits(plan_of<2, kTokenTiles>(args)) ? 2
                                                       : 1;
  const bool regular = args.mask_variant_stride >= args.mask_row_stride * args.N &&
                       args.mask_variant_stride % args.mask_row_stride == 0 &&
                       args.mask_variant_stride < int64_t{1} << 40;
  if (!regular) most = 1;
  for (int64_t v = 0; v < args.V; v += most) {
    MaskedLinear pass = args;
    pass.V = std::min(most, args.V - v);
    pass.mask = args.mask + v * args.mask_variant_stride;
    pass.y = static_cast<uint16_t*>(args.y) + v * args.M * args.N;
    const auto kernel = pass.V > 4   ? launch<8, kTokenTiles>
                        : pass.V > 2 ? launch<4, kTokenTiles>
                        : pass.V > 1 ? launch<2, kTokenTiles>
                                     : launch<1, kTokenTiles>;
    kernel(pass, stream);
  }
}

}  // namespace

// It does not depend on V, for the bits not to.
bool masked_few_stream_possible(const MaskedLinear& args) {
  if (args.type != FloatType::kBfloat16 || args.M > kMostTokens || compute_capability() != 90) return false;
  const bool fits =
      (args.M <= kTokenTile ? plan_of<1, 1>(args).stages : plan_of<1, 2>(args).stages) >= kLeastStages;
  return fits && tensor_map_possible(args.x, args.M, args.K, args.x_stride * 2, 2) &&
         tensor_map_possible(args.weight, args.N, args.K, args.weight_stride * 2, 2) &&
         tensor_map_possible(args.mask, args.N, (args.K + 7) / 8, args.mask_row_stride, 1) &&
         args.mask_row_stride * args.N < int64_t{1} << 40 &&
         (args.V == 1 || args.mask_variant_stride % 16 == 0);
}

void masked_few_stream(const MaskedLinear& args, CUstream_st* stream) {
  if (!masked_few_stream_possible(args)) throw std::runtime_error("masked_linear: not possible as a stream");
  if (args.V == 0) return;
  (args.M <= kTokenTile ? run_passes<1> : run_passes<2>)(args, stream);
}

}  // namespace dtm_fast
