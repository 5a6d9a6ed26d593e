// Operations straight on tensors, for the calls that need nothing but their kernel. Whatever is unusual about
// the arguments, or wrong with them, is None: Python then looks at them, and says what is wrong.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels/cpu/int8_linear.h"
#include "../kernels/cpu/masked_linear.h"
#include "../kernels/cpu/sparse_linear.h"
#include "../kernels/cpu/store_float.h"
#include "bind.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace dtm_fast {
namespace {

// How an operation is to run.
struct Call {
  int isa, num_threads;
  bool gradients;  // whether autograd may want some
};

FloatType float_type(const TensorView& x) {
  return x.type == ElementType::kFloat32 ? FloatType::kFloat32 : FloatType::kBfloat16;
}

bool is_float(const TensorView& x) {
  return x.type == ElementType::kFloat32 || x.type == ElementType::kBfloat16;
}

bool is_row_of(const TensorView& v, int64_t size) {
  return v.dims == 1 && v.shape[0] == size && v.has_whole_rows();
}

bool all_finite(const float* values, int64_t count) {
  uint32_t all_ones = 0;  // in the exponent of one of them
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    all_ones |= (bits & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
  }
  return all_ones == 0;
}

// A bias [N] or None, as kernels take it.
class Bias {
 public:
  // Whether it is one, of x's type, or float32 where that may be.
  bool view(const Call& call, py::handle bias, int64_t N, const TensorView& x, bool may_be_float32) {
    if (bias.is_none()) return true;
    TensorView found;
    if (!view_tensor(bias, call.gradients, &found) || !is_row_of(found, N)) return false;
    if (found.type != x.type && !(may_be_float32 && found.type == ElementType::kFloat32)) return false;
    if (found.type == ElementType::kFloat32) {
      data_ = reinterpret_cast<const float*>(found.data);
      return true;
    }
    widened_.resize(static_cast<size_t>(N));
    const auto* bits = reinterpret_cast<const uint16_t*>(found.data);
    std::transform(bits, bits + N, widened_.begin(), float_from_bfloat16);
    data_ = widened_.data();
    return true;
  }

  const float* data() const { return data_; }

 private:
  const float* data_ = nullptr;
  std::vector<float> widened_;
};

// The address of a result that has just been made.
void* address_of(py::handle y) {
  TensorView view;
  return view_tensor(y, false, &view) ? view.data : nullptr;
}

py::object int8_linear_directly(int isa, int num_threads, bool gradients, py::handle x, py::handle qweight,
                                py::handle scale, py::handle bias) {
  const Call call = {isa, num_threads, gradients};
  TensorView vx, vq, vs;
  Rows rows;
  Bias b;
  if (!view_tensor(x, gradients, &vx) || !is_float(vx) || !view_rows(vx, &rows)) return py::none();
  if (!view_tensor(qweight, false, &vq) || !vq.is(ElementType::kInt8, 2) || !vq.has_whole_rows()) {
    return py::none();
  }
  const int64_t N = vq.shape[0], K = vq.shape[1];
  if (K != vx.last() || K > kInt8LinearMaxK) return py::none();
  if (!view_tensor(scale, gradients, &vs) || vs.type != ElementType::kFloat32 || !is_row_of(vs, N)) {
    return py::none();
  }
  const auto* scales = reinterpret_cast<const float*>(vs.data);
  if (!all_finite(scales, N) || !b.view(call, bias, N, vx, true)) return py::none();
  py::object y = new_result(x, vx, nullptr, 0, N);
  void* const to = address_of(y);
  if (to == nullptr) return py::none();
  {
    py::gil_scoped_release release;
    int8_linear(CpuIsa(isa),
                {float_type(vx), vx.data, rows.stride, reinterpret_cast<int8_t*>(vq.data), vq.strides[0],
                 scales, b.data(), rows.count, N, K, to},
                num_threads);
  }
  return y;
}

py::object masked_linear_directly(int isa, int num_threads, bool gradients, py::handle x, py::handle weight,
                                  py::handle mask, py::handle bias) {
  const Call call = {isa, num_threads, gradients};
  TensorView vx, vw, vm;
  Rows rows;
  Bias b;
  if (!view_tensor(x, gradients, &vx) || !is_float(vx) || !view_rows(vx, &rows)) return py::none();
  if (!view_tensor(weight, gradients, &vw) || !vw.is(vx.type, 2) || !vw.has_whole_rows()) return py::none();
  const int64_t N = vw.shape[0], K = vw.shape[1];
  if (K != vx.last() || K % 8 != 0)
    return py::none();  // bits behind the last column would have to be looked at
  if (!view_tensor(mask, false, &vm) || vm.type != ElementType::kUint8 || vm.dims < 2 || vm.dims > 3 ||
      !vm.has_whole_rows() || vm.last() != K / 8 || vm.last(1) != N) {
    return py::none();
  }
  if (!b.view(call, bias, N, vx, false)) return py::none();
  const bool several = vm.dims == 3;
  const int64_t V = several ? vm.shape[0] : 1;
  py::object y = new_result(x, vx, vm.shape, several ? 1 : 0, N);
  void* const to = address_of(y);
  if (to == nullptr) return py::none();
  {
    py::gil_scoped_release release;
    masked_linear(
        CpuIsa(isa),
        {float_type(vx), vx.data, rows.stride, vw.data, vw.strides[0], reinterpret_cast<uint8_t*>(vm.data),
         vm.strides[vm.dims - 2], several ? vm.strides[0] : 0, b.data(), V, rows.count, N, K, to},
        num_threads);
  }
  return y;
}

py::object sparse_linear_directly(int isa, int num_threads, bool gradients, py::handle x, py::handle values,
                                  py::handle columns, py::handle rows, py::handle steps, int64_t N, int64_t K,
                                  py::handle bias) {
  const Call call = {isa, num_threads, gradients};
  TensorView vx, vv, vc, vr, vs;
  Rows x_rows;
  Bias b;
  if (!view_tensor(x, gradients, &vx) || !is_float(vx) || !view_rows(vx, &x_rows)) return py::none();
  if (!view_tensor(values, gradients, &vv) || !vv.is(ElementType::kFloat32, 2) || !vv.is_contiguous() ||
      !view_tensor(columns, false, &vc) || !vc.is(ElementType::kUint8, 3) || !vc.is_contiguous() ||
      !view_tensor(rows, false, &vr) || !vr.is(ElementType::kInt16, 3) || !vr.is_contiguous() ||
      !view_tensor(steps, false, &vs) || !vs.is(ElementType::kUint8, 3) || !vs.is_contiguous()) {
    return py::none();
  }
  if (N < 0 || K != vx.last()) return py::none();
  const SparseLayout cut = sparse_layout(N, K);
  if (vv.last() != kSparseLanes || vc.last() != kSparseWord || vc.last(1) != kSparseLanes ||
      vr.shape[0] != cut.panels || vr.shape[1] != cut.blocks || vr.shape[2] != cut.panel_rows ||
      vs.shape[0] != cut.panels || vs.shape[1] != cut.blocks || vs.shape[2] != cut.groups) {
    return py::none();
  }
  if (!b.view(call, bias, N, vx, false)) return py::none();
  py::object y = new_result(x, vx, nullptr, 0, N);
  void* const to = address_of(y);
  if (to == nullptr) return py::none();
  {
    py::gil_scoped_release release;
    sparse_linear(
        CpuIsa(isa),
        {float_type(vx),
         vx.data,
         x_rows.stride,
         {reinterpret_cast<float*>(vv.data), vv.shape[0], reinterpret_cast<uint8_t*>(vc.data), vc.shape[0],
          reinterpret_cast<uint16_t*>(vr.data), reinterpret_cast<uint8_t*>(vs.data), N, K},
         b.data(),
         x_rows.count,
         to},
        num_threads);
  }
  return y;
}

}  // namespace

void bind_direct(py::module_& module) {
  module.def("use_exchange", use_exchange);
  module.def("int8_linear_directly", int8_linear_directly);
  module.def("masked_linear_directly", masked_linear_directly);
  module.def("sparse_linear_directly", sparse_linear_directly);
}

}  // namespace dtm_fast
