// Matrices as the tensor memory accelerator of compute capability 9.0 wants them described.
#pragma once

#include <cuda.h>  // types only: the driver's function comes from the runtime, nothing links to libcuda
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dtm_fast {

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* address,
                                     const cuuint64_t* sizes, const cuuint64_t* strides,
                                     const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// nullptr where the driver has none.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());  // the next check is not to find it
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
  }();
  return encoder;
}

// Whether tensor_map takes a [rows, K] matrix: both positive and, to the end of the last tile,
// below 2^31, rows that begin on 16 bytes and
// do not overlap.
inline bool tensor_map_possible(const void* address, int64_t rows, int64_t K, int64_t row_bytes,
                                int64_t entry_bytes) {
  constexpr int64_t kMostRows = INT32_MAX - 1024, kMostRowBytes = int64_t{1} << 40;
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && row_bytes % 16 == 0 && rows >= 1 &&
         rows < kMostRows && K >= 1 && K < kMostRows && row_bytes >= K * entry_bytes &&
         row_bytes < kMostRowBytes && tensor_map_encoder() != nullptr;
}

// A [rows, K] matrix of which tiles of box_rows rows and 128 bytes of K are loaded, swizzled for wgmma, and
// with zeros for what lies outside.
inline CUtensorMap tensor_map(CUtensorMapDataType type, const void* address, int64_t rows, int64_t K,
                              int64_t row_bytes, int64_t entry_bytes, int box_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(K), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / entry_bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, type, 2, const_cast<void*>(address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  return map;
}

}  // namespace dtm_fast
