// Tensors of torch as C++ sees them without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace dtm_fast {

enum class ElementType { kFloat32, kBfloat16, kInt8, kUint8, kInt16, kOther };

// A dense tensor in the CPU's memory, strides in elements. Lives no longer than the tensor.
struct TensorView {
  char* data;
  ElementType type;
  int64_t dims;
  const int64_t* shape;
  const int64_t* strides;

  int64_t last(int64_t back = 0) const { return shape[dims - 1 - back]; }
  // Whether neighbours in the last dimension lie side by side.
  bool has_whole_rows() const { return dims > 0 && strides[dims - 1] == 1; }
  bool is_contiguous() const;
  bool has_elements() const;
  bool is(ElementType wanted, int64_t wanted_dims) const { return type == wanted && dims == wanted_dims; }
};

// What a tensor [..., K] is as rows.
struct Rows {
  int64_t count, stride;
};

// Gives access to the memory of tensors.
//
// exchange: torch.Tensor.__dlpack_c_exchange_api__
// tensor, parameter: torch.Tensor and torch.nn.Parameter; other classes may mean something else by their
// memory
void use_exchange(const pybind11::capsule& exchange, const pybind11::type& tensor,
                  const pybind11::type& parameter);

// Whether `object` is such a tensor, whose values are what lies in its memory, and no gradient of it is
// wanted; `gradients`: whether one may be.
bool view_tensor(pybind11::handle object, bool gradients, TensorView* view);

// Whether a tensor [..., K] can be read as rows where it lies.
bool view_rows(const TensorView& x, Rows* rows);

// x.new_empty([*leading, *x.shape[:-1], columns])
pybind11::object new_result(pybind11::handle x, const TensorView& view, const int64_t* leading,
                            int64_t leading_dims, int64_t columns);

}  // namespace dtm_fast
