#include "launch.h"
#include "logit_summary.cuh"
#include "mma.cuh"
#include "token_divergence.h"

namespace dtm_fast {
namespace {

constexpr int kElementBytes = 2;
// The exponentials are summed over groups of 32 tokens, each within four lanes, then over the groups in
// order. So a row's sums do not depend on how a shape divides its tile among warps, that is, not on the
// number of rows.
constexpr int kGroupTokens = 32;
constexpr int kGroupFragments = kGroupTokens / 8;

constexpr int kVocabularyTile = kSmallestVocabularyTile;
constexpr int kTileGroups = kVocabularyTile / kGroupTokens;
using FewRows = MmaShape<32, kVocabularyTile, 1, 4>;
using SomeRows = MmaShape<64, kVocabularyTile, 1, 4>;
using ManyRows = MmaShape<128, kVocabularyTile, 2, 3>;

// What the warps tell each other at the end, in the memory that held the tiles.
template <typename Shape>
struct Exchange {
  Candidate leaders[Shape::kColWarps][Shape::kRows];
  float sums[kTileGroups][Shape::kRows];
};

template <typename Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    divergence_mma_kernel(const TokenDivergence args, int row_tiles, int col_tiles) {
  extern __shared__ __align__(128) unsigned char shared[];
  static_assert(sizeof(Exchange<Shape>) <= Shape::kSharedBytes, "it must fit");
  const TilePlace place = place_of_tile(blockIdx.x, row_tiles, col_tiles);
  const int64_t first_row = static_cast<int64_t>(place.row) * Shape::kRows;
  const int64_t first_token = static_cast<int64_t>(place.col) * Shape::kCols;
  const Operand hidden = {static_cast<const char*>(args.hidden), args.hidden_stride * kElementBytes, args.T,
                          args.D * kElementBytes};
  const Operand lm_head = {static_cast<const char*>(args.lm_head), args.lm_head_stride * kElementBytes,
                           args.V, args.D * kElementBytes};
  float logits[Shape::kRowFragments][Shape::kColFragments][4];
  multiply_tile<Shape, kAligned, kAligned>(hidden, first_row, lm_head, first_token, shared, logits);

  Exchange<Shape>& exchange = *reinterpret_cast<Exchange<Shape>*>(shared);
  const int lane = Shape::lane(), in_quad = lane % 4;
  const int warp_row = Shape::warp_row() + lane / 4;     // of fragment 0
  const int warp_col = Shape::warp_col() + 2 * in_quad;  // of fragment 0
  const int tokens = static_cast<int>(min(args.V - first_token, static_cast<int64_t>(Shape::kCols)));
  constexpr float kInfinity = INFINITY;
#pragma unroll
  for (int half_fragment = 0; half_fragment < 2 * Shape::kRowFragments; ++half_fragment) {
    const int i = half_fragment / 2, half = half_fragment % 2;
    const int row = warp_row + i * 16 + half * 8;
    const int64_t t = first_row + row;
    const int64_t reference = t < args.T ? args.reference[t] - first_token : -1;
    Candidate best = {-kInfinity, warp_col};
#pragma unroll
    for (int j = 0; j < Shape::kColFragments; ++j) {
      const uint32_t pair = bfloat16_pair(logits[i][j][half * 2], logits[i][j][half * 2 + 1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = warp_col + j * 8 + e;
        float logit = __uint_as_float(e == 0 ? pair << 16 : pair & 0xffff0000u);
        if (token == reference) args.own_logit[t] = logit;
        if (token >= tokens) logit = -kInfinity;  // behind all tokens: it cannot lead
        logits[i][j][half * 2 + e] = logit;
        if (takes_lead(logit, best.logit)) best = {logit, token};
      }
    }
    best = leader_of_lanes<4>(best);
    if (in_quad == 0) exchange.leaders[Shape::warp_col() / Shape::kWarpCols][row] = best;
  }
  __syncthreads();
#pragma unroll
  for (int half_fragment = 0; half_fragment < 2 * Shape::kRowFragments; ++half_fragment) {
    const int i = half_fragment / 2, half = half_fragment % 2;
    const int row = warp_row + i * 16 + half * 8;
    float largest = exchange.leaders[0][row].logit;
#pragma unroll
    for (int warp = 1; warp < Shape::kColWarps; ++warp) {
      const float other = exchange.leaders[warp][row].logit;
      if (takes_lead(other, largest)) largest = other;
    }
#pragma unroll
    for (int j0 = 0; j0 < Shape::kColFragments; j0 += kGroupFragments) {
      float sum = 0.0f;
#pragma unroll
      for (int j = j0; j < j0 + kGroupFragments; ++j) {
        sum += exp_term(logits[i][j][half * 2], largest);
        sum += exp_term(logits[i][j][half * 2 + 1], largest);
      }
      sum = sum_of_lanes<4>(sum);
      if (in_quad == 0) exchange.sums[(Shape::warp_col() + j0 * 8) / kGroupTokens][row] = sum;
    }
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x);
  const int64_t t = first_row + row;
  if (row >= Shape::kRows || t >= args.T) return;
  Candidate best = exchange.leaders[0][row];
#pragma unroll
  for (int warp = 1; warp < Shape::kColWarps; ++warp) best = leader(best, exchange.leaders[warp][row]);
  float sum = exchange.sums[0][row];
#pragma unroll
  for (int group = 1; group < kTileGroups; ++group) sum += exchange.sums[group][row];
  args.summaries[place.col * args.T + t] = {best.logit, sum, static_cast<int32_t>(first_token) + best.id};
}

template <typename Shape>
void launch(const TokenDivergence& args, CUstream_st* stream) {
  const bool aligned = is_aligned(args.hidden, args.hidden_stride * kElementBytes, args.T, kChunkBytes) &&
                       is_aligned(args.lm_head, args.lm_head_stride * kElementBytes, args.V, kChunkBytes);
  const int row_tiles = static_cast<int>(tiles_of(args.T, Shape::kRows));
  const int col_tiles = static_cast<int>(tiles_of(args.V, Shape::kCols));
  const auto kernel = aligned ? divergence_mma_kernel<Shape, true> : divergence_mma_kernel<Shape, false>;
  const auto blocks = static_cast<unsigned>(static_cast<int64_t>(row_tiles) * col_tiles);
  kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, stream>>>(args, row_tiles, col_tiles);
  check_cuda(cudaGetLastError(), "token_divergence");
}

}  // namespace

int64_t divergence_mma(const TokenDivergence& args, CUstream_st* stream) {
  if (args.T == 0) return kVocabularyTile;
  if (args.T <= FewRows::kRows)
    launch<FewRows>(args, stream);
  else if (args.T <= SomeRows::kRows)
    launch<SomeRows>(args, stream);
  else
    launch<ManyRows>(args, stream);
  return kVocabularyTile;
}

}  // namespace dtm_fast
