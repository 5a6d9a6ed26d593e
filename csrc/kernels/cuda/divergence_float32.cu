#include "ffma_tile.cuh"
#include "launch.h"
#include "logit_summary.cuh"
#include "token_divergence.h"

namespace dtm_fast {
namespace {

constexpr int kElementBytes = 4;

template <typename Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    divergence_float32_kernel(const TokenDivergence args, int row_tiles, int col_tiles) {
  extern __shared__ __align__(128) unsigned char shared[];
  static_assert(Shape::kCols == kSmallestVocabularyTile, "there is memory for the summaries of such tiles");
  const TilePlace place = place_of_tile(blockIdx.x, row_tiles, col_tiles);
  const int64_t first_row = static_cast<int64_t>(place.row) * Shape::kRows;
  const int64_t first_token = static_cast<int64_t>(place.col) * Shape::kCols;
  const Operand hidden = {static_cast<const char*>(args.hidden), args.hidden_stride * kElementBytes, args.T,
                          args.D * kElementBytes};
  const Operand lm_head = {static_cast<const char*>(args.lm_head), args.lm_head_stride * kElementBytes,
                           args.V, args.D * kElementBytes};
  float logits[Shape::kThreadRows][Shape::kThreadCols];
  multiply_float32<Shape, kAligned>(hidden, first_row, lm_head, first_token, shared, logits,
                                    [](int, unsigned char*) {});

  // 16 neighbouring lanes hold the tile's part of a row.
  const int tokens = static_cast<int>(min(args.V - first_token, static_cast<int64_t>(Shape::kCols)));
  const int thread_col = Shape::thread_col();
  constexpr float kInfinity = INFINITY;
#pragma unroll
  for (int i = 0; i < Shape::kThreadRows; ++i) {
    const int64_t t = first_row + Shape::thread_row() + i * Shape::kSide;
    const int64_t reference = t < args.T ? args.reference[t] - first_token : -1;
    Candidate best = {-kInfinity, thread_col};
#pragma unroll
    for (int j = 0; j < Shape::kThreadCols; ++j) {
      const int token = thread_col + j * Shape::kSide;
      if (token == reference) args.own_logit[t] = logits[i][j];
      if (token >= tokens) logits[i][j] = -kInfinity;  // behind all tokens: it cannot lead
      if (takes_lead(logits[i][j], best.logit)) best = {logits[i][j], token};
    }
    best = leader_of_lanes<Shape::kSide>(best);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < Shape::kThreadCols; ++j) sum += exp_term(logits[i][j], best.logit);
    sum = sum_of_lanes<Shape::kSide>(sum);
    if (thread_col == 0 && t < args.T)
      args.summaries[place.col * args.T + t] = {best.logit, sum, static_cast<int32_t>(first_token) + best.id};
  }
}

template <typename Shape>
void launch(const TokenDivergence& args, CUstream_st* stream) {
  const bool aligned = is_aligned(args.hidden, args.hidden_stride * kElementBytes, args.T, kChunkBytes) &&
                       is_aligned(args.lm_head, args.lm_head_stride * kElementBytes, args.V, kChunkBytes);
  const int row_tiles = static_cast<int>(tiles_of(args.T, Shape::kRows));
  const int col_tiles = static_cast<int>(tiles_of(args.V, Shape::kCols));
  const auto kernel =
      aligned ? divergence_float32_kernel<Shape, true> : divergence_float32_kernel<Shape, false>;
  const auto blocks = static_cast<unsigned>(static_cast<int64_t>(row_tiles) * col_tiles);
  kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, stream>>>(args, row_tiles, col_tiles);
  check_cuda(cudaGetLastError(), "token_divergence");
}

}  // namespace

int64_t divergence_float32(const TokenDivergence& args, CUstream_st* stream) {
  if (args.T == 0) return kSmallestVocabularyTile;
  args.T > SmallFfmaShape::kRows ? launch<LargeFfmaShape>(args, stream)
                                 : launch<SmallFfmaShape>(args, stream);
  return kSmallestVocabularyTile;
}

}  // namespace dtm_fast
