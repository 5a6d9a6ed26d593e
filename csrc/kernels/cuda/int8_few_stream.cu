#include <stdexcept>
#include <type_traits>

#include "few_stream.cuh"
#include "hopper_launch.h"
#include "int8_linear.h"
#include "quantize_int8.cuh"
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

// Few rows of x every block quantizes for itself, while its ring fills: each row by a team of warps, which
// keeps it in registers, kKept times 16 bytes in a thread.
constexpr int kKept = 8;

__host__ __device__ constexpr int warps_of_team(int M) { return M <= 1 ? 8 : M <= 2 ? 4 : M <= 4 ? 2 : 1; }

template <typename S, typename Bits>
struct Quantizer {
  static constexpr int kChunk = 16 / sizeof(Bits);  // entries
  const few_stream::Stream<S>& stream;
  int M, warps, token;
  int first, step;  // entries of this thread
  int K, end;       // end of the row, and of the last line
  uint4 kept[kKept];

  __device__ Quantizer(const few_stream::Stream<S>& stream_, const Plan& plan, const Int8Linear& args)
      : stream(stream_), M(static_cast<int>(args.M)), warps(warps_of_team(M)) {
    const int thread = static_cast<int>(threadIdx.x);
    token = thread / (32 * warps);
    first = thread % (32 * warps) * kChunk;
    step = 32 * warps * kChunk;
    K = static_cast<int>(args.K);
    end = token < M ? plan.units * few_stream::kLineBytes : 0;
    const Bits* x = static_cast<const Bits*>(args.x) + token * args.x_stride;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int k = first + i * step;
      kept[i] = token < M && k < K ? *reinterpret_cast<const uint4*>(x + k) : make_uint4(0, 0, 0, 0);
    }
  }

  // To the tokens in shared memory, for all threads. The sums' memory is used meanwhile. Returns the scale of
  // this token.
  __device__ float run(int of_token) const {
    uint32_t* const of_warp = reinterpret_cast<uint32_t*>(stream.sums);
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) largest = quantization::largest<Bits>(largest, kept[i]);
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (stream.lane == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
    const auto divisor_of = [&](int row) {
      uint32_t value = 0;
      for (int i = 0; i < warps; ++i) value = max(value, of_warp[row * warps + i]);
      return quantization::divisor_of(value);
    };
    const float scale = of_token < M ? divisor_of(of_token).scale : 0.0f;
    const quantization::Divisor divisor = divisor_of(token);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int k = first + i * step;
      if (k >= end) break;
      uint32_t words[4 / sizeof(Bits)];
      quantization::quantize_chunk<Bits>(kept[i], divisor, words);
      const uint32_t to = stream.token_byte(k, token, M);
#pragma unroll
      for (int word = 0; word < static_cast<int>(4 / sizeof(Bits)); ++word)
        few_stream::store_word(to + 4 * word, words[word]);
    }
    __syncthreads();
    return scale;
  }
};

template <typename T, int kTokenTiles, bool kQuantizes>
__global__ void __launch_bounds__(kThreads, 1)
    int8_few_stream_kernel(const __grid_constant__ Maps maps, const Plan plan, const Int8Linear args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<kTokenTiles>;
  extern __shared__ uint8_t shared[];
  few_stream::Stream<S> stream(shared, maps, plan, few_stream::kLineBytes);
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
  Factors next_factors;
  float scale_x = 0.0f;
  stream.make_barriers();
  if constexpr (kQuantizes) {
    // Nothing at all is read before the wait: the kernel in front may be anybody's. The next one may begin
    // where a block of this one ends.
    wait_for_grid();
    let_next_grid_begin();
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    const Quantizer<S, Bits> quantizer(stream, plan, args);
    stream.fill_all();
    next_factors = load_factors(0);
    scale_x = quantizer.run(my_token);
  } else {
    stream.fill_all();
    next_factors = load_factors(0);
    wait_for_grid();
    let_next_grid_begin();
    stream.load_tokens(M);
    if (my_token < M) scale_x = __ldcg(args.scale_x + my_token);
  }

#pragma unroll 1
  for (int chunk = 0; chunk < plan.chunks; ++chunk) {
    if constexpr (!kQuantizes) {
      stream.enter(chunk);
      stream.wait_for_tokens();
    }
#pragma unroll 1
    for (int tile = 0; tile < stream.tiles; ++tile) {
      const bool is_last_tile = tile + 1 == stream.tiles;
      const int n = column(tile);
      const Factors factors = next_factors;
      next_factors = load_factors(is_last_tile && !stream.is_last_chunk() ? 0 : tile + 1);

      int32_t sums[kTokenTiles][4] = {};
#pragma unroll 1
      for (int unit = 0; unit < stream.units; ++unit) {
        uint4 x[2][kTokenTiles], w[2][2];
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const int token = g + kTokenTile * j;
          const uint32_t address = stream.token_chunk(unit, 0, token, M);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            x[i][j] = token < M ? few_stream::load_chunk(address ^ (16 * i)) : make_uint4(0, 0, 0, 0);
        }
        stream.wait();
        const uint32_t address = stream.weight_chunk(0);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            w[i][half] = few_stream::load_chunk((address ^ (16 * i)) + half * (few_stream::kTileBytes / 2));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            mma_int8(sums[j], w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y, x[i][j].x, x[i][j].y);
            mma_int8(sums[j], w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w, x[i][j].z, x[i][j].w);
          }
        }
        stream.next();
        if constexpr (!kQuantizes)
          if (is_last_tile && !stream.is_last_chunk()) stream.replace_tokens(unit, M);
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
        if constexpr (!kQuantizes) {
          int32_t& partial = reinterpret_cast<int32_t*>(stream.partials)[tile * kThreads + threadIdx.x];
          if (chunk > 0) sum += partial;
          if (!stream.is_last_chunk()) {
            partial = sum;
            continue;
          }
        }
        float value = __fmul_rn(__int2float_rn(sum), __fmul_rn(scale_x, factors.scale));
        if (args.bias != nullptr) value = __fadd_rn(value, factors.bias);
        store(static_cast<T*>(args.y) + my_token * args.N + n, value);
      }
    }
  }
#endif
}

// All of K at once where that leaves room for the ring: sums of integers are the same in every order.
Plan plan_of(const Int8Linear& args) {
  const auto make = args.M <= kTokenTile ? few_stream::make_plan<Shape<1>> : few_stream::make_plan<Shape<2>>;
  for (int chunks = 1; chunks <= few_stream::kMostChunks; ++chunks) {
    const Plan plan = make(args.M, args.N, args.K, kSharedLimit, chunks);
    if (plan.stages >= kLeastStages) return plan;
  }
  return {};
}

template <typename T, int kTokenTiles, bool kQuantizes>
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
  launch_clusters(int8_few_stream_kernel<T, kTokenTiles, kQuantizes>, "int8_linear", 1, plan.groups, kThreads,
                  plan.shared_bytes, kSharedLimit, /*early=*/true, stream, maps, plan, args);
}

template <typename T>
void choose_tokens(const Int8Linear& args, CUstream_st* stream) {
  (int8_few_stream_quantizes(args) ? launch<T, 1, true>
   : args.M <= kTokenTile          ? launch<T, 1, false>
                                   : launch<T, 2, false>)(args, stream);
}

}  // namespace

bool int8_few_stream_possible(const Int8Linear& args) {
  return args.M <= kMostTokens && compute_capability() == 90 &&
         tensor_map_possible(args.qx, args.M, args.K, args.qx_stride, 1) &&
         tensor_map_possible(args.qweight, args.N, args.K, args.qweight_stride, 1) &&
         plan_of(args).stages > 0;
}

bool int8_few_stream_quantizes(const Int8Linear& args) {
  const int64_t entry = args.type == FloatType::kFloat32 ? 4 : 2, chunk = 16 / entry;
  if (args.M < 1 || args.M > kTokenTile || !int8_few_stream_possible(args)) return false;
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.x_stride % chunk == 0;
  const Plan plan = plan_of(args);
  const int64_t row = int64_t{plan.units} * few_stream::kLineBytes;
  return aligned && plan.chunks == 1 && args.K % chunk == 0 &&
         row <= kKept * chunk * 32 * warps_of_team(static_cast<int>(args.M));
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
