#include <stdexcept>

#include "few_stream.cuh"
#include "hopper_launch.h"
#include "int8_linear.h"
#include "tensor_map.h"

namespace dtm_fast {
namespace {

using namespace few_tokens;
using few_stream::kThreads;
using few_stream::kWarps;
using few_stream::Maps;
using few_stream::Plan;

template <int kTokenTiles>
using Shape = few_stream::Shape<1, 0, kTokenTiles>;

// Of shared memory. It leaves room for a block of the quantization, beside which this kernel begins.
constexpr int kSharedLimit = 200 * 1024;
constexpr int kLeastStages = 3;  // 48 KiB on their way, more than latency times bandwidth of a multiprocessor

template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    int8_few_stream_kernel(const __grid_constant__ Maps maps, const Plan plan, const Int8Linear args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<kTokenTiles>;
  extern __shared__ uint8_t shared[];
  few_stream::Stream<S> stream(shared, maps, plan, few_stream::kLineBytes);
  stream.fill_all();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const int M = static_cast<int>(args.M);
  const int my_row = threadIdx.x % kRowTile, my_token = threadIdx.x / kRowTile;  // of a tile's results
  int32_t* const all_sums = reinterpret_cast<int32_t*>(stream.sums);
  struct Factors {
    float scale, bias;
  };
  // Of this thread's result of a tile; asked for a tile ahead.
  const auto column = [&](int tile) { return stream.first_row + tile * kRowTile + my_row; };
  const auto is_mine = [&](int n) { return my_token < M && n < stream.end_row && n < args.N; };
  const auto load_factors = [&](int tile) {
    const int n = column(tile);
    Factors factors = {0.0f, 0.0f};
    if (!is_mine(n)) return factors;
    factors.scale = few_stream::load_early(args.scale + n);
    if (args.bias != nullptr) factors.bias = few_stream::load_early(args.bias + n);
    return factors;
  };
  Factors next_factors = load_factors(0);
  wait_for_grid();
  stream.load_tokens(M);
  const float scale_x = my_token < M ? __ldcg(args.scale_x + my_token) : 0.0f;
  stream.wait_for_tokens();

#pragma unroll 1
  for (int tile = 0; tile < stream.tiles; ++tile) {
    const int n = column(tile);
    const Factors factors = next_factors;
    next_factors = load_factors(tile + 1);

    int32_t sums[kTokenTiles][4] = {};
#pragma unroll 1
    for (int unit = 0; unit < stream.units; ++unit) {
      uint4 x[2][kTokenTiles], w[2][2];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = g + kTokenTile * j;
        const uint32_t chunk = stream.token_chunk(unit, 0, token, M);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          x[i][j] = token < M ? few_stream::load_chunk(chunk ^ (16 * i)) : make_uint4(0, 0, 0, 0);
      }
      stream.wait();
      const uint32_t chunk = stream.weight_chunk(0);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          w[i][half] = few_stream::load_chunk((chunk ^ (16 * i)) + half * (few_stream::kTileBytes / 2));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          mma_int8(sums[j], w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y, x[i][j].x, x[i][j].y);
          mma_int8(sums[j], w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w, x[i][j].z, x[i][j].w);
        }
      }
      stream.next();
    }

    __syncthreads();  // the sums of the tile before are read
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
      put_sums<kRowTile>(all_sums + warp * S::kSums, sums[j], 0, kTokenTile * j, lane);
    __syncthreads();
    if (is_mine(n)) {
      int32_t sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w)
        sum += all_sums[w * S::kSums + my_token * kSumStride<kRowTile> + my_row];
      float value = __fmul_rn(__int2float_rn(sum), __fmul_rn(scale_x, factors.scale));
      if (args.bias != nullptr) value = __fadd_rn(value, factors.bias);
      store(static_cast<T*>(args.y) + my_token * args.N + n, value);
    }
  }
#endif
}

Plan plan_of(const Int8Linear& args) {
  return (args.M <= kTokenTile ? few_stream::make_plan<Shape<1>>
                               : few_stream::make_plan<Shape<2>>)(args.M, args.N, args.K, kSharedLimit);
}

template <typename T, int kTokenTiles>
void launch(const Int8Linear& args, CUstream_st* stream) {
  const auto weight = [&](int rows) {
    return tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, args.qweight, args.N, args.K, args.qweight_stride, 1,
                      rows);
  };
  Maps maps = {};
  maps.tile = weight(kRowTile);
  maps.group = weight(few_stream::kGroup);
  maps.tokens = tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, args.qx, args.M, args.K, args.qx_stride, 1,
                           static_cast<int>(args.M));
  const Plan plan = plan_of(args);
  launch_clusters(int8_few_stream_kernel<T, kTokenTiles>, "int8_linear", 1, plan.groups, kThreads,
                  plan.shared_bytes, /*early=*/true, stream, maps, plan, args);
}

template <typename T>
void choose_tokens(const Int8Linear& args, CUstream_st* stream) {
  (args.M <= kTokenTile ? launch<T, 1> : launch<T, 2>)(args, stream);
}

}  // namespace

bool int8_few_stream_possible(const Int8Linear& args) {
  return args.M <= kMostTokens && compute_capability() == 90 &&
         tensor_map_possible(args.qx, args.M, args.K, args.qx_stride, 1) &&
         tensor_map_possible(args.qweight, args.N, args.K, args.qweight_stride, 1) &&
         plan_of(args).stages >= kLeastStages;
}

void int8_few_stream(const Int8Linear& args, CUstream_st* stream) {
  if (!int8_few_stream_possible(args)) throw std::runtime_error("int8_linear: not possible as a stream");
  if (args.type == FloatType::kFloat32) {
    choose_tokens<float>(args, stream);
  } else {
    choose_tokens<uint16_t>(args, stream);
  }
}

}  // namespace dtm_fast
