#include <algorithm>
#include <stdexcept>
#include <string>

#include "unpack_mask.h"

namespace dtm_fast {
namespace {

constexpr int kWide = 16;  // bytes of one store

// Four bits as four bytes: the copies do not overlap, and bit i of copy i lands in byte i.
__device__ uint32_t spread(uint32_t bits) { return (bits * 0x00204081u) & 0x01010101u; }

// One thread per 16 entries, from one aligned address to the next: one wide store, and one division for all
// of them ("Vectorized memory access", NVIDIA's blog, 2013). kStream: rows end with a whole byte and the mask
// is aligned, so that it is one stream of bits, of which a thread has two bytes.
template <bool kStream>
__global__ void unpack_mask_kernel(const uint8_t* packed, int64_t size, int64_t K, uint8_t* mask, int shift) {
  const int64_t row_bytes = (K + 7) / 8;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kWide;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t begin = thread * kWide - shift; begin < size; begin += step) {
    if (kStream && begin + kWide <= size) {
      const uint32_t low = packed[begin / 8], high = packed[begin / 8 + 1];
      *reinterpret_cast<uint4*>(mask + begin) =
          make_uint4(spread(low & 15), spread(low >> 4), spread(high & 15), spread(high >> 4));
      continue;
    }
    const int64_t first = begin < 0 ? 0 : begin;
    int64_t k = first % K;
    const uint8_t* row = packed + first / K * row_bytes;
    uint32_t words[kWide / 4] = {};
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const int64_t entry = begin + i;
      if (entry < 0 || entry >= size) continue;
      const uint32_t bit = (row[k / 8] >> (k % 8)) & 1;
      words[i / 4] |= bit << (8 * (i % 4));
      if (++k == K) {
        k = 0;
        row += row_bytes;
      }
    }
    if (begin >= 0 && begin + kWide <= size) {
      *reinterpret_cast<uint4*>(mask + begin) = make_uint4(words[0], words[1], words[2], words[3]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      if (begin + i >= 0 && begin + i < size)
        mask[begin + i] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
  }
}

}  // namespace

void unpack_mask_cuda(const uint8_t* packed, int64_t N, int64_t K, uint8_t* mask, CUstream_st* stream) {
  const int64_t size = N * K;
  if (size == 0) return;
  constexpr int64_t kThreads = 256;
  constexpr int64_t kMaxBlocks = 1 << 20;  // more entries than that: every thread takes several times 16
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(mask) % kWide);
  const int64_t threads = (size + shift + kWide - 1) / kWide;
  const auto blocks = static_cast<unsigned>(std::min(kMaxBlocks, (threads + kThreads - 1) / kThreads));
  const auto kernel = K % 8 == 0 && shift == 0 ? unpack_mask_kernel<true> : unpack_mask_kernel<false>;
  kernel<<<blocks, kThreads, 0, stream>>>(packed, size, K, mask, shift);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("unpack_mask: ") + cudaGetErrorString(error));
}

}  // namespace dtm_fast
