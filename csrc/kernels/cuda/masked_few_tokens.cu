#include <algorithm>
#include <stdexcept>

#include "few_tokens.h"
#include "masked_linear.h"

namespace dtm_fast {
namespace {

using namespace few_tokens;

// A block takes a few rows of the weight and divides K among its warps, in a way that only K decides; so do
// the warps' steps, and the sums of the warps are added in the order of the warps.
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 32;  // of K: 16 bytes for each of the four lanes of a row, and one byte of each mask

// kVariants: masks of one pass; kTiles: tiles of 16 rows; kTokenTiles: tiles of 8 tokens; kAhead: steps that
// a warp has asked for ahead, as many as the registers of kBlocks blocks allow.
template <int kVariants_, int kTiles_, int kTokenTiles_, int kAhead_, int kBlocks_>
struct Shape {
  static constexpr int kVariants = kVariants_, kTiles = kTiles_, kTokenTiles = kTokenTiles_, kAhead = kAhead_,
                       kBlocks = kBlocks_, kRows = kRowTile * kTiles_;
};

// What a lane reads for one step.
template <typename S>
struct Step {
  uint4 w[2 * S::kTiles], x[S::kTokenTiles];
  uint32_t mask[S::kVariants][2 * S::kTiles];
};

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kBlocks) masked_few_tokens_kernel(MaskedLinear args) {
  constexpr int kVariants = S::kVariants, kTiles = S::kTiles, kTokenTiles = S::kTokenTiles,
                kAhead = S::kAhead;
  __shared__ float sums[kWarps][kTokenTile * kTokenTiles * kSumStride<S::kRows>];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int M = static_cast<int>(args.M), V = static_cast<int>(args.V);
  const int64_t n0 = int64_t{blockIdx.x} * S::kRows;

  const uint16_t* weight[2 * kTiles];
  const uint8_t* mask[2 * kTiles];
#pragma unroll
  for (int i = 0; i < 2 * kTiles;
       ++i) {  // rows beyond N are read from the last one; their sums are not stored
    const int64_t n = min(n0 + g + 8 * i, args.N - 1);
    weight[i] = static_cast<const uint16_t*>(args.weight) + n * args.weight_stride + 8 * t;
    mask[i] = args.mask + n * args.mask_row_stride + t;
  }
  const uint16_t* tokens[kTokenTiles];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j)
    tokens[j] = static_cast<const uint16_t*>(args.x) + int64_t{g + 8 * j} * args.x_stride + 8 * t;

  float tile[kVariants][kTiles][kTokenTiles][4] = {};
  const auto multiply = [&](const Step<S>& step) {
#pragma unroll
    for (int v = 0; v < kVariants; ++v) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint4 low = keep(step.w[2 * i], step.mask[v][2 * i]);
        const uint4 high = keep(step.w[2 * i + 1], step.mask[v][2 * i + 1]);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const uint4& x = step.x[j];
          mma_bfloat16(tile[v][i][j], low.x, high.x, low.y, high.y, x.x, x.y);
          mma_bfloat16(tile[v][i][j], low.z, high.z, low.w, high.w, x.z, x.w);
        }
      }
    }
  };
  // Variants beyond V are those of the last one; their sums are not stored.
  const auto variant = [&](int v) { return min(v, V - 1) * args.mask_variant_stride; };
  const auto load = [&](Step<S>& to, int64_t index) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) to.w[i] = load_once(weight[i] + index * kStep);
#pragma unroll
    for (int v = 0; v < kVariants; ++v)
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) to.mask[v][i] = __ldg(mask[i] + variant(v) + index * (kStep / 8));
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      to.x[j] = make_uint4(0, 0, 0, 0);
      if (g + 8 * j < M) to.x[j] = __ldg(reinterpret_cast<const uint4*>(tokens[j] + index * kStep));
    }
  };

  const int64_t steps = args.K / kStep, begin = steps * warp / kWarps, end = steps * (warp + 1) / kWarps;
  Step<S> ahead[kAhead];
#pragma unroll
  for (int d = 0; d < kAhead; ++d)
    if (begin + d < end) load(ahead[d], begin + d);
  for (int64_t step = begin; step < end; step += kAhead) {
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
      if (step + d < end) multiply(ahead[d]);
      if (step + d + kAhead < end) load(ahead[d], step + d + kAhead);
    }
  }
  if (warp == kWarps - 1 && args.K % kStep != 0) {
    const int64_t k = steps * kStep, left = args.K - k - 8 * t;
    Step<S> last;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) last.w[i] = load_some(weight[i] + k, left);
#pragma unroll
    for (int v = 0; v < kVariants; ++v)
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i)
        last.mask[v][i] = left > 0 ? __ldg(mask[i] + variant(v) + k / 8) : 0;
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) last.x[j] = load_some(tokens[j] + k, g + 8 * j < M ? left : 0);
    multiply(last);
  }

#pragma unroll
  for (int v = 0; v < kVariants; ++v) {
    if (v >= V) break;
    __syncthreads();  // the sums of the mask before are read
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j)
        put_sums<S::kRows>(sums[warp], tile[v][i][j], kRowTile * i, kTokenTile * j, lane);
    __syncthreads();
    for (int i = threadIdx.x; i < S::kRows * M; i += kThreads) {
      const int row = i % S::kRows, m = i / S::kRows;
      const int64_t n = n0 + row;
      if (n >= args.N) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum = __fadd_rn(sum, sums[w][m * kSumStride<S::kRows> + row]);
      if (args.bias != nullptr) sum = __fadd_rn(sum, args.bias[n]);
      store(static_cast<uint16_t*>(args.y) + (v * args.M + m) * args.N + n, sum);
    }
  }
}

template <typename S>
void launch(const MaskedLinear& args, CUstream_st* stream) {
  const auto blocks = static_cast<unsigned>((args.N + S::kRows - 1) / S::kRows);
  masked_few_tokens_kernel<S><<<blocks, kThreads, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "masked_linear");
}

// At most 8 masks.
template <int kTokenTiles>
void choose(const MaskedLinear& args, CUstream_st* stream) {
  // 32 rows need half as many reads of the tokens, 16 make more blocks.
  const bool enough_blocks = args.N * 3 >= int64_t{2} * multiprocessors() * 2 * kRowTile;
  if (args.V == 1 && enough_blocks) return launch<Shape<1, 2, kTokenTiles, 3, 2>>(args, stream);
  if (args.V == 1) return launch<Shape<1, 1, kTokenTiles, 4, 2>>(args, stream);
  if (args.V == 2) return launch<Shape<2, 1, kTokenTiles, kTokenTiles == 1 ? 4 : 3, 2>>(args, stream);
  if (args.V <= 4) return launch<Shape<4, 1, kTokenTiles, 3, 2>>(args, stream);
  return launch<Shape<8, 1, kTokenTiles, 4, 1>>(args, stream);
}

}  // namespace

bool masked_few_tokens_possible(const MaskedLinear& args) {
  const auto aligned = [](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % 8 == 0;
  };
  return args.type == FloatType::kBfloat16 && args.M <= kMostTokens && aligned(args.x, args.x_stride) &&
         aligned(args.weight, args.weight_stride) && compute_capability() >= 80;
}

void masked_few_tokens(const MaskedLinear& args, CUstream_st* stream) {
  if (!masked_few_tokens_possible(args))
    throw std::runtime_error("masked_linear: not possible for few tokens");
  if (args.V == 0 || args.M == 0 || args.N == 0) return;
  constexpr int64_t kMostVariants = 8;  // of one pass over the weight
  for (int64_t v = 0; v < args.V; v += kMostVariants) {
    MaskedLinear pass = args;
    pass.V = std::min(kMostVariants, args.V - v);
    pass.mask = args.mask + v * args.mask_variant_stride;
    pass.y = static_cast<uint16_t*>(args.y) + v * args.M * args.N;
    (args.M <= kTokenTile ? choose<1> : choose<2>)(pass, stream);
  }
}

}  // namespace dtm_fast
