#include <stdexcept>

#include "masked_linear.h"

namespace dtm_fast {
namespace {

constexpr int64_t kMostFewTokens = 16;
// From here on a tile of wgmma is worth its rows.
constexpr int64_t kLeastHopperTokens = 64;

CudaKernel best_kernel(const MaskedLinear& args) {
  if (masked_few_stream_possible(args)) return CudaKernel::kFewTokensStream;
  if (args.M <= kMostFewTokens && masked_few_tokens_possible(args)) return CudaKernel::kFewTokens;
  if (args.M >= kLeastHopperTokens && masked_hopper_possible(args)) return CudaKernel::kHopper;
  return CudaKernel::kMma;
}

}  // namespace

bool masked_linear_possible(CudaKernel kernel, const MaskedLinear& args) {
  switch (kernel) {
    case CudaKernel::kFewTokens:
      return masked_few_tokens_possible(args);
    case CudaKernel::kFewTokensStream:
      return masked_few_stream_possible(args);
    case CudaKernel::kHopper:
      return masked_hopper_possible(args);
    case CudaKernel::kBest:
    case CudaKernel::kMma:
      return true;
  }
  return false;
}

void masked_linear_cuda(CudaKernel kernel, const MaskedLinear& args, CUstream_st* stream) {
  if (!masked_linear_possible(kernel, args))
    throw std::runtime_error("masked_linear: this kernel cannot take these arguments on this device");
  if (args.V == 0 || args.M == 0 || args.N == 0) return;
  switch (kernel == CudaKernel::kBest ? best_kernel(args) : kernel) {
    case CudaKernel::kFewTokens:
      return masked_few_tokens(args, stream);
    case CudaKernel::kFewTokensStream:
      return masked_few_stream(args, stream);
    case CudaKernel::kHopper:
      return masked_hopper(args, stream);
    default:
      return args.type == FloatType::kBfloat16 ? masked_mma(args, stream) : masked_float32(args, stream);
  }
}

}  // namespace dtm_fast
