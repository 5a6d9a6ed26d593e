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

// Activations [..., K], float32 or bfloat16, and the result that an operation makes of them.
class Activations {
 public:
  // Whether kernels can read x where it lies.
  bool view(py::handle x, bool gradients) {
    x_ = x;
    return view_tensor(x, gradients, &view_) &&
           (view_.type == ElementType::kFloat32 || view_.type == ElementType::kBfloat16) &&
           view_rows(view_, &rows_);
  }

  ElementType element_type() const { return view_.type; }
  FloatType type() const {
    return view_.type == ElementType::kFloat32 ? FloatType::kFloat32 : FloatType::kBfloat16;
  }
  const void* data() const { return view_.data; }
  int64_t stride() const { return rows_.stride; }
  int64_t M() const { return rows_.count; }
  int64_t K() const { return view_.last(); }

  // The result [*leading, ..., N], into whose memory run(y) writes without the GIL.
  template <typename Run>
  py::object result(const int64_t* leading, int64_t leading_dims, int64_t N, const Run& run) const {
    py::object y = new_result(x_, view_, leading, leading_dims, N);
    TensorView view;
    if (!view_tensor(y, false, &view)) return py::none();
    {
      py::gil_scoped_release release;
      run(view.data);
    }
    return y;
  }

 private:
  py::handle x_;
  TensorView view_;
  Rows rows_;
};

// A bias [N] or None, as kernels take it.
class Bias {
 public:
  // Whether it is one, of the activations' type, or float32 where that may be.
  bool view(py::handle bias, bool gradients, int64_t N, ElementType type, bool may_be_float32) {
    if (bias.is_none()) return true;
    TensorView found;
    if (!view_tensor(bias, gradients, &found) || !is_row_of(found, N)) return false;
    if (found.type != type && !(may_be_float32 && found.type == ElementType::kFloat32)) return false;
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

// gradients: whether autograd may want some.
py::object int8_linear_directly(int isa, int num_threads, bool gradients, py::handle x_object,
                                py::handle qweight, py::handle scale, py::handle bias) {
  Activations x;
  TensorView q, s;
  Bias b;
  if (!x.view(x_object, gradients)) return py::none();
  if (!view_tensor(qweight, false, &q) || !q.is(ElementType::kInt8, 2) || !q.has_whole_rows()) {
    return py::none();
  }
  // Shapes and strides lie in the tensors, which others may change once the GIL is released.
  const int64_t N = q.shape[0], K = q.shape[1], q_stride = q.strides[0];
  if (K != x.K() || K > kInt8LinearMaxK) return py::none();
  if (!view_tensor(scale, gradients, &s) || s.type != ElementType::kFloat32 || !is_row_of(s, N)) {
    return py::none();
  }
  const auto* scales = reinterpret_cast<const float*>(s.data);
  if (!all_finite(scales, N) || !b.view(bias, gradients, N, x.element_type(), true)) return py::none();
  return x.result(nullptr, 0, N, [&](void* y) {
    int8_linear(CpuIsa(isa),
                {x.type(), x.data(), x.stride(), reinterpret_cast<int8_t*>(q.data), q_stride, scales,
                 b.data(), x.M(), N, K, y},
                num_threads);
  });
}

py::object masked_linear_directly(int isa, int num_threads, bool gradients, py::handle x_object,
                                  py::handle weight, py::handle mask, py::handle bias) {
  Activations x;
  TensorView w, m;
  Bias b;
  if (!x.view(x_object, gradients)) return py::none();
  if (!view_tensor(weight, gradients, &w) || !w.is(x.element_type(), 2) || !w.has_whole_rows()) {
    return py::none();
  }
  const int64_t N = w.shape[0], K = w.shape[1], w_stride = w.strides[0];
  if (K != x.K() || K % 8 != 0) return py::none();  // bits behind the last column would have to be looked at
  if (!view_tensor(mask, false, &m) || m.type != ElementType::kUint8 || m.dims < 2 || m.dims > 3 ||
      !m.has_whole_rows() || m.last() != K / 8 || m.last(1) != N) {
    return py::none();
  }
  if (!b.view(bias, gradients, N, x.element_type(), false)) return py::none();
  const bool several = m.dims == 3;
  const int64_t V = several ? m.shape[0] : 1, mask_stride = several ? m.strides[0] : 0;
  const int64_t row_stride = m.strides[m.dims - 2];
  return x.result(&V, several ? 1 : 0, N, [&](void* y) {
    masked_linear(CpuIsa(isa),
                  {x.type(), x.data(), x.stride(), w.data, w_stride, reinterpret_cast<uint8_t*>(m.data),
                   row_stride, mask_stride, b.data(), V, x.M(), N, K, y},
                  num_threads);
  });
}

py::object sparse_linear_directly(int isa, int num_threads, bool gradients, py::handle x_object,
                                  py::handle values, py::handle columns, py::handle rows, py::handle steps,
                                  int64_t N, int64_t K, py::handle bias) {
  Activations x;
  TensorView v, c, r, s;
  Bias b;
  if (!x.view(x_object, gradients) || N < 0 || K != x.K()) return py::none();
  if (!view_tensor(values, gradients, &v) || !v.is(ElementType::kFloat32, 2) || !v.is_contiguous() ||
      !view_tensor(columns, false, &c) || !c.is(ElementType::kUint8, 3) || !c.is_contiguous() ||
      !view_tensor(rows, false, &r) || !r.is(ElementType::kInt16, 3) || !r.is_contiguous() ||
      !view_tensor(steps, false, &s) || !s.is(ElementType::kUint8, 3) || !s.is_contiguous()) {
    return py::none();
  }
  const SparseLayout cut = sparse_layout(N, K);
  if (v.last() != kSparseLanes || c.last() != kSparseWord || c.last(1) != kSparseLanes ||
      r.shape[0] != cut.panels || r.shape[1] != cut.blocks || r.shape[2] != cut.panel_rows ||
      s.shape[0] != cut.panels || s.shape[1] != cut.blocks || s.shape[2] != cut.groups) {
    return py::none();
  }
  if (!b.view(bias, gradients, N, x.element_type(), false)) return py::none();
  const SparseWeight weight = {reinterpret_cast<float*>(v.data),
                               v.shape[0],
                               reinterpret_cast<uint8_t*>(c.data),
                               c.shape[0],
                               reinterpret_cast<uint16_t*>(r.data),
                               reinterpret_cast<uint8_t*>(s.data),
                               N,
                               K};
  return x.result(nullptr, 0, N, [&](void* y) {
    sparse_linear(CpuIsa(isa), {x.type(), x.data(), x.stride(), weight, b.data(), x.M(), y}, num_threads);
  });
}

}  // namespace

void bind_direct(py::module_& module) {
  module.def("use_exchange", use_exchange);
  module.def("int8_linear_directly", int8_linear_directly);
  module.def("masked_linear_directly", masked_linear_directly);
  module.def("sparse_linear_directly", sparse_linear_directly);
}

}  // namespace dtm_fast
