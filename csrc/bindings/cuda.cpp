// dtm_fast._cuda: the CUDA kernels, for tensors given as device addresses and sizes, on a stream given as an
// address. Imports on a machine without a GPU: the CUDA runtime is linked statically and opens the driver at
// its first call.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../kernels/cuda/bitmap_linear.h"
#include "../kernels/cuda/certificate_threats.h"
#include "../kernels/cuda/int8_linear.h"
#include "../kernels/cuda/masked_linear.h"
#include "../kernels/cuda/quantize_int8.h"
#include "../kernels/cuda/token_divergence.h"
#include "../kernels/cuda/unpack_mask.h"

namespace py = pybind11;
using namespace dtm_fast;

namespace {

using Address = std::uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

CUstream_st* stream_at(Address address) { return pointer<CUstream_st>(address); }

Int8Linear int8_linear(int type, Address x, int64_t x_stride, Address qweight, int64_t qweight_stride,
                       Address scale, Address bias, int64_t M, int64_t N, int64_t K, Address y, Address qx,
                       int64_t qx_stride, Address scale_x) {
  return {static_cast<FloatType>(type),
          pointer<void>(x),
          x_stride,
          pointer<int8_t>(qweight),
          qweight_stride,
          pointer<float>(scale),
          pointer<float>(bias),
          M,
          N,
          K,
          pointer<void>(y),
          pointer<int8_t>(qx),
          qx_stride,
          pointer<float>(scale_x)};
}

MaskedLinear masked_linear(int type, Address x, int64_t x_stride, Address weight, int64_t weight_stride,
                           Address mask, int64_t mask_row_stride, int64_t mask_variant_stride, Address bias,
                           int64_t V, int64_t M, int64_t N, int64_t K, Address y) {
  return {static_cast<FloatType>(type),
          pointer<void>(x),
          x_stride,
          pointer<void>(weight),
          weight_stride,
          pointer<uint8_t>(mask),
          mask_row_stride,
          mask_variant_stride,
          pointer<float>(bias),
          V,
          M,
          N,
          K,
          pointer<void>(y)};
}

TokenDivergence token_divergence(int type, Address hidden, int64_t hidden_stride, Address lm_head,
                                 int64_t lm_head_stride, Address reference, int64_t T, int64_t V, int64_t D,
                                 Address mismatch, Address nll, Address summaries, Address own_logit) {
  return {static_cast<FloatType>(type),
          pointer<void>(hidden),
          hidden_stride,
          pointer<void>(lm_head),
          lm_head_stride,
          pointer<int64_t>(reference),
          T,
          V,
          D,
          pointer<uint8_t>(mismatch),
          pointer<float>(nll),
          pointer<LogitSummary>(summaries),
          pointer<float>(own_logit)};
}

// <name>(kernel, ..., stream) runs an operation, <name>_possible(kernel, ...) says whether that kernel can.
template <typename Args, typename... Values>
void define(py::module_& module, const std::string& name, Args (*args)(Values...),
            void (*run)(CudaKernel, const Args&, CUstream_st*), bool (*possible)(CudaKernel, const Args&)) {
  module.def(
      name.c_str(),
      [=](int kernel, Values... values, Address stream) {
        run(static_cast<CudaKernel>(kernel), args(values...), stream_at(stream));
      },
      Unlocked());
  module.def((name + "_possible").c_str(), [=](int kernel, Values... values) {
    return possible(static_cast<CudaKernel>(kernel), args(values...));
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of dtm_fast";

  module.def(
      "quantize_int8",
      [](int type, Address x, int64_t x_stride, int64_t M, int64_t K, Address q, int64_t q_stride,
         Address scale, Address stream) {
        quantize_int8_cuda({static_cast<FloatType>(type), pointer<void>(x), x_stride, M, K,
                            pointer<int8_t>(q), q_stride, pointer<float>(scale)},
                           stream_at(stream));
      },
      Unlocked());

  define(module, "int8_linear", int8_linear, int8_linear_cuda, int8_linear_possible);
  define(module, "masked_linear", masked_linear, masked_linear_cuda, masked_linear_possible);
  define(module, "token_divergence", token_divergence, token_divergence_cuda, token_divergence_possible);

  module.def(
      "bitmap_linear",
      [](int type, Address x, int64_t x_stride, Address bits, Address begins, Address values, Address bias,
         int64_t M, int64_t N, int64_t K, Address y, Address stream) {
        bitmap_linear_cuda({static_cast<FloatType>(type), pointer<void>(x), x_stride, pointer<uint32_t>(bits),
                            pointer<int64_t>(begins), pointer<void>(values), pointer<float>(bias), M, N, K,
                            pointer<void>(y)},
                           stream_at(stream));
      },
      Unlocked());

  module.def(
      "certificate_threats",
      [](int type, Address hidden, int64_t hidden_stride, Address base, Address radius, int64_t P, int64_t D,
         int64_t R, float enlarged, float added, Address threats, Address top, Address nearest,
         Address reference, int64_t V, Address mismatch, Address counts, int64_t counts_size,
         Address stream) {
        const ThreatMarks marks = {pointer<int64_t>(top),
                                   pointer<int64_t>(nearest),
                                   pointer<int64_t>(reference),
                                   V,
                                   pointer<uint8_t>(mismatch),
                                   pointer<int32_t>(counts),
                                   counts_size};
        certificate_threats_cuda(
            {static_cast<FloatType>(type), pointer<void>(hidden), hidden_stride, pointer<void>(base),
             pointer<float>(radius), P, D, R, enlarged, added, pointer<int64_t>(threats)},
            counts == 0 ? nullptr : &marks, stream_at(stream));
      },
      Unlocked());

  module.def(
      "select_threatened",
      [](Address threats, Address reference, int64_t P, int64_t V, int64_t least, int64_t most, Address bits,
         int64_t classes, Address before, int64_t rows, int64_t tokens, Address positions, Address among,
         Address ids, Address stream) {
        select_threatened_cuda({pointer<int64_t>(threats), pointer<int64_t>(reference), P, V, least, most,
                                pointer<uint32_t>(bits), classes, pointer<int32_t>(before), rows, tokens,
                                pointer<int64_t>(positions), pointer<int64_t>(among), pointer<int64_t>(ids)},
                               stream_at(stream));
      },
      Unlocked());

  module.def(
      "unpack_mask",
      [](Address packed, int64_t N, int64_t K, Address mask, Address stream) {
        unpack_mask_cuda(pointer<uint8_t>(packed), N, K, pointer<uint8_t>(mask), stream_at(stream));
      },
      Unlocked());
}
