#include <stdexcept>

#include "launch.h"
#include "logit_summary.cuh"
#include "token_divergence.h"

namespace dtm_fast {
namespace {

// A block merges the tiles of 8 rows, 32 threads to a row. Each takes a slice of neighbouring tiles in the
// order of their ids, then the slices are merged in order. What is read from memory together lies together.
constexpr int kRows = 8, kSlices = 32;

__global__ void __launch_bounds__(kRows* kSlices)
    merge_tiles_kernel(const TokenDivergence args, int64_t tiles) {
  __shared__ Candidate leaders[kSlices][kRows];
  __shared__ double sums[kSlices][kRows];
  const int in_block = static_cast<int>(threadIdx.x) % kRows, slice = static_cast<int>(threadIdx.x) / kRows;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kRows + in_block;
  const bool has_row = t < args.T;
  const int64_t slice_tiles = (tiles + kSlices - 1) / kSlices;
  const int64_t first = min(slice * slice_tiles, tiles), last = min(first + slice_tiles, tiles);

  constexpr float kInfinity = INFINITY;
  Candidate best = {-kInfinity, INT32_MAX};  // no token at all
  if (has_row) {
#pragma unroll 4
    for (int64_t tile = first; tile < last; ++tile) {
      const LogitSummary& summary = args.summaries[tile * args.T + t];
      best = leader(best, {summary.max, summary.argmax});
    }
  }
  leaders[slice][in_block] = best;
  __syncthreads();
  best = leaders[0][in_block];
#pragma unroll 4
  for (int other = 1; other < kSlices; ++other) best = leader(best, leaders[other][in_block]);

  // The sum over many tiles stays as exact as that of a tile in double precision, of which there is little to
  // do.
  double sum = 0.0;
  const bool finite = fabsf(best.logit) < kInfinity;
  if (has_row && finite) {
#pragma unroll 4
    for (int64_t tile = first; tile < last; ++tile) {
      const LogitSummary& summary = args.summaries[tile * args.T + t];
      // A tile of -infinity has no sum.
      if (summary.max > -kInfinity)
        sum += static_cast<double>(summary.sum_exp * expf(summary.max - best.logit));
    }
  }
  sums[slice][in_block] = sum;
  __syncthreads();
  if (slice != 0 || !has_row) return;
  for (int other = 1; other < kSlices; ++other) sum += sums[other][in_block];
  // As torch.logsumexp: infinite (or NaN) exactly where the largest logit is.
  const double log_sum_exp =
      finite ? static_cast<double>(best.logit) + log(sum) : static_cast<double>(best.logit);
  args.mismatch[t] = best.id != args.reference[t] ? 1 : 0;
  args.nll[t] = static_cast<float>(log_sum_exp - static_cast<double>(args.own_logit[t]));
}

void merge_tiles(const TokenDivergence& args, int64_t tile_tokens, CUstream_st* stream) {
  const int64_t tiles = (args.V + tile_tokens - 1) / tile_tokens;
  const auto blocks = static_cast<unsigned>((args.T + kRows - 1) / kRows);
  merge_tiles_kernel<<<blocks, kRows * kSlices, 0, stream>>>(args, tiles);
  check_cuda(cudaGetLastError(), "token_divergence");
}

// Not by T, though tiles of wgmma are mostly empty for few rows: the last bits of a row are to be the same
// whichever rows are asked for, and a head that is read once limits few rows anyway.
CudaKernel best_kernel(const TokenDivergence& args) {
  return divergence_hopper_possible(args) ? CudaKernel::kHopper : CudaKernel::kMma;
}

}  // namespace

bool token_divergence_possible(CudaKernel kernel, const TokenDivergence& args) {
  switch (kernel) {
    case CudaKernel::kFewTokens:
    case CudaKernel::kFewTokensStream:
      return false;  // kMma has a tile for few rows
    case CudaKernel::kHopper:
      return divergence_hopper_possible(args);
    case CudaKernel::kBest:
    case CudaKernel::kMma:
      return true;
  }
  return false;
}

void token_divergence_cuda(CudaKernel kernel, const TokenDivergence& args, CUstream_st* stream) {
  if (!token_divergence_possible(kernel, args))
    throw std::runtime_error("token_divergence: this kernel cannot take these arguments on this device");
  if (args.T == 0) return;
  if (kernel == CudaKernel::kBest) kernel = best_kernel(args);
  const int64_t tile_tokens = kernel == CudaKernel::kHopper       ? divergence_hopper(args, stream)
                              : args.type == FloatType::kBfloat16 ? divergence_mma(args, stream)
                                                                  : divergence_float32(args, stream);
  merge_tiles(args, tile_tokens, stream);
}

}  // namespace dtm_fast
