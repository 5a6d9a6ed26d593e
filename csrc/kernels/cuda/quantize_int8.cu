#include <algorithm>

#include "few_tokens.h"
#include "quantize_int8.cuh"
#include "quantize_int8.h"

namespace dtm_fast {
namespace {

using few_tokens::let_next_grid_begin;
using few_tokens::load_some;
using few_tokens::wait_for_grid;
using quantization::Divisor;
using quantization::divisor_of;
using quantization::largest;
using quantization::quantize_chunk;

constexpr int kMostThreads = 1024;

// T is an unsigned integer of the size of an element: its bits.

// 16 bytes of a row, from element k on, 0 beyond its end.
template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* row, int64_t k, int64_t K, bool aligned) {
  if (aligned && k + static_cast<int64_t>(16 / sizeof(T)) <= K)
    return *reinterpret_cast<const uint4*>(row + k);
  return load_some(row + k, K - k);
}

// The maximum over the block, in every thread.
__device__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[kMostThreads / 32];
  const unsigned lane = threadIdx.x % 32;
  value = __reduce_max_sync(0xffffffffu, value);
  if (lane == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, lane < blockDim.x / 32 ? of_warp[lane] : 0);
}

// Quantizes 16 bytes of a row and stores them up to the end of the row of q.
template <typename T>
__device__ __forceinline__ void store_chunk(const uint4& chunk, const Divisor& divisor, int8_t* row,
                                            int64_t k, int64_t end, bool aligned) {
  constexpr int kChunk = 16 / sizeof(T);
  uint32_t words[kChunk / 4];
  quantize_chunk<T>(chunk, divisor, words);
  if (aligned && k + kChunk <= end) {
    if constexpr (kChunk == 8) {
      *reinterpret_cast<uint2*>(row + k) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint32_t*>(row + k) = words[0];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (k + i < end) row[k + i] = static_cast<int8_t>(words[i / 4] >> (i % 4 * 8));
}

// One block per row. kKept: how many times 16 bytes a thread keeps in registers between the two passes; 0:
// the row is read twice.
template <typename T, int kKept>
__global__ void __launch_bounds__(kMostThreads)
    quantize_int8_kernel(QuantizeInt8 args, bool x_aligned, bool q_aligned) {
  constexpr int kChunk = 16 / sizeof(T);
  wait_for_grid();
  let_next_grid_begin();
  const int64_t m = blockIdx.x, first = int64_t{threadIdx.x} * kChunk, step = int64_t{blockDim.x} * kChunk;
  const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
  int8_t* q = args.q + m * args.q_stride;
  uint4 kept[kKept > 0 ? kKept : 1];
  uint32_t absmax = 0;
  if constexpr (kKept > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = load_chunk(x, first + i * step, args.K, x_aligned);
#pragma unroll
    for (int i = 0; i < kKept; ++i) absmax = largest<T>(absmax, kept[i]);
  } else {
    for (int64_t k = first; k < args.K; k += step)
      absmax = largest<T>(absmax, load_chunk(x, k, args.K, x_aligned));
  }
  const Divisor divisor = divisor_of(block_max(absmax));
  if (threadIdx.x == 0) args.scale[m] = divisor.scale;
  if constexpr (kKept > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (first + i * step < args.q_stride)
        store_chunk<T>(kept[i], divisor, q, first + i * step, args.q_stride, q_aligned);
  } else {
    for (int64_t k = first; k < args.q_stride; k += step)
      store_chunk<T>(load_chunk(x, k, args.K, x_aligned), divisor, q, k, args.q_stride, q_aligned);
  }
}

template <typename T>
void launch(const QuantizeInt8& args, CUstream_st* stream) {
  constexpr int64_t kChunk = 16 / sizeof(T);
  const auto aligned = [](const void* pointer, int64_t bytes, int64_t to) {
    return reinterpret_cast<uintptr_t>(pointer) % to == 0 && bytes % to == 0;
  };
  const bool x_aligned = aligned(args.x, args.x_stride * int64_t{sizeof(T)}, 16);
  const bool q_aligned = aligned(args.q, args.q_stride, kChunk);
  const int64_t chunks = (args.q_stride + kChunk - 1) / kChunk;
  // Few rows: the sooner a block ends the better. Many: two loads per thread in flight, and smaller blocks,
  // of which a multiprocessor holds several, so that one stores while another loads.
  const int64_t kept = args.M > 4 * multiprocessors() ? 2 : 1;
  const auto kernel =
      chunks <= kMostThreads * kept
          ? (kept == 1 ? quantize_int8_kernel<T, 1> : quantize_int8_kernel<T, 2>)
          : (chunks <= 4 * kMostThreads ? quantize_int8_kernel<T, 4> : quantize_int8_kernel<T, 0>);
  // The kernels for few tokens begin beside this one and want most of the shared memory, which a
  // multiprocessor divides anew only while it is idle. And this one may be launched while the kernel in front
  // ends.
  const bool few = args.M <= few_tokens::kMostTokens;
  if (few)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "quantize_int8");
  const bool begins_early = few && compute_capability() == 90 && few_tokens::waits_for_grid(kernel);
  const int64_t per_thread = chunks <= kMostThreads * kept ? kept : 4;
  const int64_t wanted = (chunks + per_thread - 1) / per_thread;
  const int64_t threads = std::clamp<int64_t>((wanted + 31) / 32 * 32, 32, kMostThreads);
  constexpr int64_t kMostRows = 0x7fffffff;  // of one grid
  for (int64_t m = 0; m < args.M; m += kMostRows) {
    QuantizeInt8 part = args;
    part.x = static_cast<const T*>(args.x) + m * args.x_stride;
    part.q = args.q + m * args.q_stride;
    part.scale = args.scale + m;
    const auto rows = static_cast<unsigned>(std::min(kMostRows, args.M - m));
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(rows);
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = begins_early ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, part, x_aligned, q_aligned), "quantize_int8");
    check_cuda(cudaGetLastError(), "quantize_int8");
  }
}

}  // namespace

void quantize_int8_cuda(const QuantizeInt8& args, CUstream_st* stream) {
  if (args.type == FloatType::kFloat32) {
    launch<uint32_t>(args, stream);
  } else {
    launch<uint16_t>(args, stream);
  }
}

}  // namespace dtm_fast
