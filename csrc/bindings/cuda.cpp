// dtm_fast._cuda: the CUDA kernels, for tensors given as device addresses and sizes, on a stream given as an
// address. Imports on a machine without a GPU: the CUDA runtime is linked statically and opens the driver at
// its first call.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../kernels/cuda/unpack_mask.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of dtm_fast";

  module.def(
      "unpack_mask",
      [](Address packed, int64_t N, int64_t K, Address mask, Address stream) {
        dtm_fast::unpack_mask_cuda(pointer<uint8_t>(packed), N, K, pointer<uint8_t>(mask),
                                   pointer<CUstream_st>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
}
