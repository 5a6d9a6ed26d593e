#include <stdexcept>

#include "int8_linear.h"
#include "quantize_int8.h"

namespace dtm_fast {
namespace {

// From here on a tile of wgmma is worth its rows.
constexpr int64_t kLeastHopperTokens = 64;

CudaKernel best_kernel(const Int8Linear& args) {
  if (int8_few_stream_possible(args)) return CudaKernel::kFewTokensStream;
  if (int8_few_tokens_possible(args)) return CudaKernel::kFewTokens;
  if (args.M >= kLeastHopperTokens && int8_hopper_possible(args)) return CudaKernel::kHopper;
  return CudaKernel::kMma;
}

}  // namespace

bool int8_linear_possible(CudaKernel kernel, const Int8Linear& args) {
  switch (kernel) {
    case CudaKernel::kFewTokens:
      return int8_few_tokens_possible(args);
    case CudaKernel::kFewTokensStream:
      return int8_few_stream_possible(args);
    case CudaKernel::kHopper:
      return int8_hopper_possible(args);
    case CudaKernel::kBest:
    case CudaKernel::kMma:
      return true;
  }
  return false;
}

void int8_linear_cuda(CudaKernel kernel, const Int8Linear& args, CUstream_st* stream) {
  if (!int8_linear_possible(kernel, args))
    throw std::runtime_error("int8_linear: this kernel cannot take these arguments on this device");
  if (args.M == 0 || args.N == 0) return;
  if (kernel == CudaKernel::kBest) kernel = best_kernel(args);
  if (kernel != CudaKernel::kFewTokensStream || !int8_few_stream_quantizes(args))
    quantize_int8_cuda(
        {args.type, args.x, args.x_stride, args.M, args.K, args.qx, args.qx_stride, args.scale_x}, stream);
  switch (kernel) {
    case CudaKernel::kFewTokens:
      return int8_few_tokens(args, stream);
    case CudaKernel::kFewTokensStream:
      return int8_few_stream(args, stream);
    case CudaKernel::kHopper:
      return int8_hopper(args, stream);
    default:
      return int8_mma(args, stream);
  }
}

}  // namespace dtm_fast
