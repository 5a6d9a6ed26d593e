// What the files of dtm_fast._cpu share: tensors come as addresses.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace dtm_fast {

using Address = std::uintptr_t;
using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_decoder_layer(pybind11::module_& module);
void bind_direct(pybind11::module_& module);

}  // namespace dtm_fast
