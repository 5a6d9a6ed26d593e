// By the table of functions of DLPack 1.3 (https://dmlc.github.io/dlpack/latest/python_spec.html, "C Exchange
// API"), which torch has since 2.10: a view takes some 50 ns, where the attributes of a tensor in Python take
// as many each.
#include "tensor_view.h"

#include <stdexcept>

namespace py = pybind11;

namespace dtm_fast {
namespace {

// As DLPack lays them out.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  DlExchange* earlier;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DlTensor* view);
  void* current_stream;
};

constexpr int32_t kDlCpu = 1;
constexpr uint8_t kDlInt = 0, kDlUint = 1, kDlFloat = 2, kDlBfloat = 4;

// Set once, with the GIL held, and never freed: tensors may be viewed until the interpreter ends.
const DlExchange* exchange_api = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
PyObject *requires_grad = nullptr, *is_neg = nullptr, *new_empty = nullptr;

ElementType element_type(const DlTensor& tensor) {
  if (tensor.lanes != 1) return ElementType::kOther;
  switch (tensor.code << 8 | tensor.bits) {
    case kDlFloat << 8 | 32:
      return ElementType::kFloat32;
    case kDlBfloat << 8 | 16:
      return ElementType::kBfloat16;
    case kDlInt << 8 | 8:
      return ElementType::kInt8;
    case kDlUint << 8 | 8:
      return ElementType::kUint8;
    case kDlInt << 8 | 16:
      return ElementType::kInt16;
    default:
      return ElementType::kOther;
  }
}

bool is_false(py::object answer) {
  if (answer.ptr() == nullptr) throw py::error_already_set();
  return answer.ptr() == Py_False;
}

}  // namespace

bool TensorView::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (shape[d] != 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return true;
}

bool TensorView::has_elements() const {
  for (int64_t d = 0; d < dims; ++d) {
    if (shape[d] == 0) return false;
  }
  return true;
}

void use_exchange(const py::capsule& exchange, const py::type& tensor, const py::type& parameter) {
  const DlExchange* api = exchange.get_pointer<DlExchange>();
  while (api != nullptr && api->major != 1) api = api->earlier;
  if (api == nullptr || api->tensor_from_object == nullptr) {
    throw std::runtime_error("the exchange of tensors is of a version of DLPack that is not known");
  }
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  requires_grad = PyUnicode_InternFromString("requires_grad");
  is_neg = PyUnicode_InternFromString("is_neg");
  new_empty = PyUnicode_InternFromString("new_empty");
  exchange_api = api;
}

bool view_tensor(py::handle object, bool gradients, TensorView* view) {
  PyObject* const self = object.ptr();
  if (exchange_api == nullptr || (Py_TYPE(self) != tensor_type && Py_TYPE(self) != parameter_type)) {
    return false;
  }
  DlTensor found;
  if (exchange_api->tensor_from_object(self, &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (found.device_type != kDlCpu || found.ndim == 0 || found.strides == nullptr || found.data == nullptr) {
    return false;
  }
  *view = {static_cast<char*>(found.data) + found.byte_offset, element_type(found), found.ndim, found.shape,
           found.strides};
  if (!view->has_elements()) return false;
  if (gradients && !is_false(py::reinterpret_steal<py::object>(PyObject_GetAttr(self, requires_grad)))) {
    return false;
  }
  return is_false(py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(self, is_neg)));
}

bool view_rows(const TensorView& x, Rows* rows) {
  if (!x.has_whole_rows()) return false;
  if (x.dims == 2) {
    *rows = {x.shape[0], x.strides[0]};
    return true;
  }
  if (!x.is_contiguous()) return false;
  *rows = {1, x.last()};
  for (int64_t d = 0; d + 1 < x.dims; ++d) rows->count *= x.shape[d];
  return true;
}

py::object new_result(py::handle x, const TensorView& view, const int64_t* leading, int64_t leading_dims,
                      int64_t columns) {
  py::tuple shape(static_cast<size_t>(leading_dims + view.dims));
  size_t at = 0;
  for (int64_t d = 0; d < leading_dims; ++d) shape[at++] = py::int_(leading[d]);
  for (int64_t d = 0; d + 1 < view.dims; ++d) shape[at++] = py::int_(view.shape[d]);
  shape[at] = py::int_(columns);
  PyObject* y = PyObject_CallMethodOneArg(x.ptr(), new_empty, shape.ptr());
  if (y == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(y);
}

}  // namespace dtm_fast
