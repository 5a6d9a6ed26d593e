// One bit per mask entry -> one bool per byte, on the GPU.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dtm_fast {

// packed : [N, ceil(K / 8)], contiguous, device memory
// mask   : [N, K] bytes, contiguous, device memory
//
//   mask[n, k] = bit (k mod 8) of packed[n, k / 8]
//
// Queued on the stream of the current device; does not wait for it. Throws std::runtime_error if the launch
// fails.
void unpack_mask_cuda(const uint8_t* packed, int64_t N, int64_t K, uint8_t* mask, CUstream_st* stream);

}  // namespace dtm_fast
