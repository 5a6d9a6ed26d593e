// unpack_mask on a GPU, against a plain loop on the CPU, in buffers of exactly the size that it may touch:
// for compute-sanitizer, which sees what lies one byte beyond. benchmarks/cuda/on_device.sh builds and runs
// it.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../kernels/cuda/unpack_mask.h"

namespace {

int checks = 0, failures = 0;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

void check(int64_t N, int64_t K, int64_t offset, cudaStream_t stream, std::mt19937& random) {
  const int64_t row_bytes = (K + 7) / 8, size = N * K;
  std::vector<uint8_t> packed(N * row_bytes), found(size, 0xAB);
  for (auto& each : packed) each = static_cast<uint8_t>(random());
  uint8_t *device_packed = nullptr, *device_mask = nullptr;
  // They end where the allocations end: what is read or written behind them is out of bounds.
  require(cudaMalloc(&device_packed, packed.size() + offset), "cudaMalloc");
  require(cudaMalloc(&device_mask, size + offset), "cudaMalloc");
  uint8_t *source = device_packed + offset, *target = device_mask + offset;
  require(cudaMemcpyAsync(source, packed.data(), packed.size(), cudaMemcpyHostToDevice, stream), "copy");
  dtm_fast::unpack_mask_cuda(source, N, K, target, stream);
  require(cudaMemcpyAsync(found.data(), target, size, cudaMemcpyDeviceToHost, stream), "copy");
  require(cudaStreamSynchronize(stream), "unpack_mask");
  int64_t wrong = 0;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k)
      wrong += found[n * K + k] != ((packed[n * row_bytes + k / 8] >> (k % 8)) & 1);
  ++checks;
  failures += wrong != 0;
  if (wrong != 0)
    std::printf("N = %lld, K = %lld: %lld wrong\n", static_cast<long long>(N), static_cast<long long>(K),
                static_cast<long long>(wrong));
  require(cudaFree(device_packed), "cudaFree");
  require(cudaFree(device_mask), "cudaFree");
}

}  // namespace

int main() {
  std::mt19937 random(0);
  cudaStream_t stream = nullptr;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  for (int64_t offset : {0, 1}) {
    for (int64_t K : {0, 1, 5, 7, 8, 9, 16, 31, 32, 33, 64, 123, 256, 513, 1024, 4097})
      for (int64_t N : {0, 1, 3, 64, 257}) check(N, K, offset, stream, random);
    check(1, 1000003, offset, stream, random);
    check(2048, 1536, offset, stream, random);
  }
  require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  require(cudaDeviceReset(), "cudaDeviceReset");  // so that memcheck's search for leaks sees all
  std::printf("%d sizes, %d wrong\n", checks, failures);
  return failures ? 1 : 0;
}
