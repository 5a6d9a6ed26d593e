#include <algorithm>
#include <stdexcept>

#include "few_tokens.h"
#include "int8_linear.h"

namespace dtm_fast {
namespace {

using namespace few_tokens;

// A block takes a few rows of the weight and divides K among its warps. Blocks are small and none is much
// longer than the others, so that nearly all of them run at once and ask for all the memory there is; integer
// sums need no order.
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 64;  // of K: 16 bytes for each of the four lanes of a row
// Steps that a warp has asked for ahead. With 32 rows a multiprocessor waits for about 100 KiB, several times
// what latency times bandwidth needs (Little's law): the loads queue at the memory, not in the kernel. One
// step less where the registers of two blocks would not do.
template <int kTiles, int kTokenTiles>
constexpr int kStepsAhead = kTiles * kTokenTiles == 4 ? 3 : 4;

// Tokens are in L1 and L2. Not through the read-only path: they are written while this kernel already runs.
__device__ __forceinline__ uint4 load_tokens(const int8_t* from) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// kTiles: tiles of 16 rows; two share what is read of the tokens. kTokenTiles: tiles of 8 tokens.
template <typename T, int kTiles, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2) int8_few_tokens_kernel(Int8Linear args) {
  constexpr int kRows = kRowTile * kTiles, kAhead = kStepsAhead<kTiles, kTokenTiles>;
  __shared__ int32_t sums[kWarps][kTokenTile * kTokenTiles * kSumStride<kRows>];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int M = static_cast<int>(args.M), K = static_cast<int>(args.K);
  const int64_t n0 = int64_t{blockIdx.x} * kRows;

  const int8_t* weight[2 * kTiles];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i)  // rows beyond N are read from the last one; their sums are not stored
    weight[i] = args.qweight + min(n0 + g + 8 * i, args.N - 1) * args.qweight_stride + 16 * t;
  const int8_t* tokens[kTokenTiles];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) tokens[j] = args.qx + int64_t{g + 8 * j} * args.qx_stride + 16 * t;

  int32_t tile[kTiles][kTokenTiles][4] = {};
  const auto multiply = [&](const uint4(&w)[2 * kTiles], const uint4(&x)[kTokenTiles]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        mma_int8(tile[i][j], w[2 * i].x, w[2 * i + 1].x, w[2 * i].y, w[2 * i + 1].y, x[j].x, x[j].y);
        mma_int8(tile[i][j], w[2 * i].z, w[2 * i + 1].z, w[2 * i].w, w[2 * i + 1].w, x[j].z, x[j].w);
      }
    }
  };

  const int steps = K / kStep, begin = steps * warp / kWarps, end = steps * (warp + 1) / kWarps;
  uint4 ahead[kAhead][2 * kTiles];
#pragma unroll
  for (int d = 0; d < kAhead; ++d) {
    if (begin + d < end) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) ahead[d][i] = load_once(weight[i] + (begin + d) * kStep);
    }
  }
  wait_for_grid();
  for (int step = begin; step < end; step += kAhead) {
    uint4 x[kAhead][kTokenTiles];
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        x[d][j] = make_uint4(0, 0, 0, 0);
        if (step + d < end && g + 8 * j < M) x[d][j] = load_tokens(tokens[j] + (step + d) * kStep);
      }
    }
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
      if (step + d < end) multiply(ahead[d], x[d]);
      if (step + d + kAhead < end) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) ahead[d][i] = load_once(weight[i] + (step + d + kAhead) * kStep);
      }
    }
  }
  if (warp == kWarps - 1 && K % kStep != 0) {
    const int k = steps * kStep, left = K - k - 16 * t;  // qx is 0 from K to the next multiple of 16
    uint4 w[2 * kTiles], x[kTokenTiles];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      w[i] = load_some(reinterpret_cast<const uint8_t*>(weight[i] + k), left);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      x[j] = make_uint4(0, 0, 0, 0);
      if (left > 0 && g + 8 * j < M) x[j] = load_tokens(tokens[j] + k);
    }
    multiply(w, x);
  }

#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
      put_sums<kRows>(sums[warp], tile[i][j], kRowTile * i, kTokenTile * j, lane);
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * M; i += kThreads) {
    const int row = i % kRows, m = i / kRows;
    const int64_t n = n0 + row;
    if (n >= args.N) continue;
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][m * kSumStride<kRows> + row];
    float value = __fmul_rn(__int2float_rn(sum), __fmul_rn(__ldcg(args.scale_x + m), args.scale[n]));
    if (args.bias != nullptr) value = __fadd_rn(value, args.bias[n]);
    store(static_cast<T*>(args.y) + m * args.N + n, value);
  }
}

template <typename T, int kTiles, int kTokenTiles>
void launch(const Int8Linear& args, CUstream_st* stream) {
  const auto kernel = int8_few_tokens_kernel<T, kTiles, kTokenTiles>;
  bool dependent = false;
  if (compute_capability() == 90) {
    static const bool waits = waits_for_grid(kernel);
    dependent = waits;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((args.N + kRowTile * kTiles - 1) / (kRowTile * kTiles)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), "int8_linear");
}

template <typename T, int kTiles>
void choose_tokens(const Int8Linear& args, CUstream_st* stream) {
  (args.M <= kTokenTile ? launch<T, kTiles, 1> : launch<T, kTiles, 2>)(args, stream);
}

template <typename T>
void choose_rows(const Int8Linear& args, CUstream_st* stream) {
  // 32 rows need half as many reads of the tokens, 16 make more blocks.
  const bool enough_blocks = args.N * 3 >= int64_t{2} * multiprocessors() * 2 * kRowTile;
  (enough_blocks ? choose_tokens<T, 2> : choose_tokens<T, 1>)(args, stream);
}

}  // namespace

bool int8_few_tokens_possible(const Int8Linear& args) {
  const bool aligned = reinterpret_cast<uintptr_t>(args.qweight) % 16 == 0 && args.qweight_stride % 16 == 0;
  return args.M <= kMostTokens && aligned && compute_capability() >= 80;
}

void int8_few_tokens(const Int8Linear& args, CUstream_st* stream) {
  if (!int8_few_tokens_possible(args)) throw std::runtime_error("int8_linear: not possible for few tokens");
  if (args.M == 0 || args.N == 0) return;
  if (args.type == FloatType::kFloat32) {
    choose_rows<float>(args, stream);
  } else {
    choose_rows<uint16_t>(args, stream);
  }
}

}  // namespace dtm_fast
