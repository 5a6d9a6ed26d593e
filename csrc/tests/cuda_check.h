// The tools of the C++ tests on a GPU: buffers of exactly the size, and the count of what failed.
//
// Guard bytes before and behind every buffer are checked at its end. compute-sanitizer sees more, reads too,
// if the buffer ends where its allocation ends: run it with DTM_FAST_EXACT_BUFFERS=1, which leaves the guard
// behind away.
#pragma once

#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../kernels/cpu/float_type.h"
#include "../kernels/cpu/store_float.h"
#include "check.h"  // Random

namespace dtm_fast::test {

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

inline int sizes = 0, failures = 0;

// Counts one comparison; says what failed, as printf does, for the first twenty.
__attribute__((format(printf, 2, 3))) inline void expect(bool right, const char* format, ...) {
  ++sizes;
  if (right) return;
  if (++failures > 20) return;
  std::va_list rest;
  va_start(rest, format);
  std::printf("FAILED: ");
  std::vprintf(format, rest);
  std::printf("\n");
  va_end(rest);
}

// Whether a size is left out: with DTM_FAST_EVERY=n only every n-th runs, for a sanitizer that slows all
// down.
inline bool left_out() {
  static const char* const asked = std::getenv("DTM_FAST_EVERY");
  static const long every = asked == nullptr ? 1 : std::atol(asked);
  static long count = 0;
  return every > 1 && count++ % every != 0;
}

// The last line of main: `return finish();`.
inline int finish() {
  require(cudaDeviceReset(), "cudaDeviceReset");  // so that memcheck's search for leaks sees all
  std::printf("%d sizes, %d failures\n", sizes, failures);
  return failures ? 1 : 0;
}

// `size` elements on the device, `offset` elements behind an address that is aligned to 256 bytes. Without
// contents they are poisoned: every byte is 0xFF, a NaN in float32 and bfloat16.
template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t size, int64_t offset = 0) : size_(size), front_(kGuard + bytes(offset)) {
    const size_t behind = std::getenv("DTM_FAST_EXACT_BUFFERS") != nullptr ? 0 : kGuard;
    all_ = front_ + bytes(size) + behind;
    require(cudaMalloc(&memory_, all_), "cudaMalloc");
    require(cudaMemset(memory_, kCanary, all_), "cudaMemset");
    poison();
  }
  explicit DeviceBuffer(const std::vector<T>& contents, int64_t offset = 0)
      : DeviceBuffer(static_cast<int64_t>(contents.size()), offset) {
    require(cudaMemcpy(data(), contents.data(), bytes(size_), cudaMemcpyHostToDevice), "cudaMemcpy");
    require(cudaDeviceSynchronize(), "cudaMemcpy");  // a stream that does not block must not run ahead of it
  }
  ~DeviceBuffer() {
    std::vector<unsigned char> found(all_);
    require(cudaDeviceSynchronize(), "kernel");
    require(cudaMemcpy(found.data(), memory_, all_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    bool whole = true;
    for (size_t i = 0; i < front_; ++i) whole = whole && found[i] == kCanary;
    for (size_t i = front_ + bytes(size_); i < all_; ++i) whole = whole && found[i] == kCanary;
    if (!whole) expect(false, "a write outside a buffer of %lld elements", static_cast<long long>(size_));
    require(cudaFree(memory_), "cudaFree");
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  T* data() const { return reinterpret_cast<T*>(memory_ + front_); }
  int64_t size() const { return size_; }

  void poison() {
    require(cudaMemset(data(), 0xFF, bytes(size_)), "cudaMemset");
    require(cudaDeviceSynchronize(), "cudaMemset");
  }

  // The contents, once the device has finished.
  std::vector<T> host() const {
    std::vector<T> found(static_cast<size_t>(size_));
    require(cudaDeviceSynchronize(), "kernel");
    require(cudaMemcpy(found.data(), data(), bytes(size_), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return found;
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kCanary = 0xa5;
  static size_t bytes(int64_t elements) { return static_cast<size_t>(elements) * sizeof(T); }

  int64_t size_;
  size_t front_, all_ = 0;
  unsigned char* memory_ = nullptr;
};

// A stream of its own for what is tested: kernels must use the one they are given.
class Stream {
 public:
  Stream() { require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  ~Stream() { require(cudaStreamDestroy(stream_), "cudaStreamDestroy"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }  // NOLINT(google-explicit-constructor)

 private:
  cudaStream_t stream_ = nullptr;
};

// Bits of `type` as float32, and back; elements of a DeviceBuffer<uint16_t> or <float>.
inline float to_float(uint16_t bits) { return float_from_bfloat16(bits); }
inline float to_float(float value) { return value; }
template <typename T>
T from_float(float value) {
  if constexpr (sizeof(T) == 2) {
    return bfloat16_bits(value);
  } else {
    return value;
  }
}
template <typename T>
constexpr FloatType float_type() {
  return sizeof(T) == 2 ? FloatType::kBfloat16 : FloatType::kFloat32;
}

// The same bits: NaN equals NaN, 0 does not equal -0.
template <typename T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

}  // namespace dtm_fast::test
