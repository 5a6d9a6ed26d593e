// The C++ tests' only tools: CHECK, and buffers that notice a write outside their bounds.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../kernels/cpu/cpu_features.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(address, size) ASAN_POISON_MEMORY_REGION(address, size)
#define UNPOISON(address, size) ASAN_UNPOISON_MEMORY_REGION(address, size)
#else
#define POISON(address, size) (void)0
#define UNPOISON(address, size) (void)0
#endif

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

// For the inner loops of twins: one thread alone runs them, and ThreadSanitizer makes them ten times as slow.
#define NO_THREAD_SANITIZER __attribute__((no_sanitize("thread")))

namespace dtm_fast::test {

// `size` elements between two canaries, at an address that is aligned to 8 bytes only. The destructor checks
// the canaries for writes; under ASan they are poisoned, so that reads are caught too.
template <typename T>
class GuardedBuffer {
 public:
  explicit GuardedBuffer(int64_t size) : bytes_(2 * kGuard + static_cast<size_t>(size) * sizeof(T), kCanary) {
    POISON(bytes_.data(), kGuard);
    POISON(bytes_.data() + bytes_.size() - kGuard, kGuard);
  }
  ~GuardedBuffer() {
    UNPOISON(bytes_.data(), bytes_.size());
    for (size_t i = 0; i < kGuard; ++i)
      CHECK(bytes_[i] == kCanary && bytes_[bytes_.size() - 1 - i] == kCanary);
  }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  T* data() { return reinterpret_cast<T*>(bytes_.data() + kGuard); }
  T& operator[](int64_t index) { return data()[index]; }

 private:
  static constexpr size_t kGuard = 72;
  static constexpr unsigned char kCanary = 0xa5;
  std::vector<unsigned char> bytes_;
};

// Whether ThreadSanitizer looks on, to which what runs on one thread alone says nothing.
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadsOnly = true;
#else
constexpr bool kThreadsOnly = false;
#endif

// A small generator (Knuth's MMIX linear congruence, upper bits), the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int64_t integer(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits()) % (high - low + 1); }
  float uniform() { return static_cast<float>(bits() >> 8) * 0x1p-23f - 1.0f; }  // in [-1, 1)

 private:
  uint64_t state_;
};

// Calls run(isa) for every instruction set that this machine has.
template <typename Run>
void for_each_isa(const Run& run) {
  for (int isa = 1; isa <= static_cast<int>(detected_cpu_isa()); ++isa) run(CpuIsa(isa));
}

}  // namespace dtm_fast::test
