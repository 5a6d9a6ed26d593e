// Uninitialized memory for intermediate results, one cache-line-aligned part per thread. Only for files
// compiled for the baseline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace dtm_fast {

template <typename T>
class ScratchBuffer {
 public:
  ScratchBuffer(int64_t parts, int64_t part_size)
      : part_size_((part_size + kLineElements - 1) / kLineElements * kLineElements),
        data_(static_cast<T*>(::operator new(static_cast<std::size_t>(parts * part_size_) * sizeof(T),
                                             std::align_val_t{kLine}))) {}
  ~ScratchBuffer() { ::operator delete(data_, std::align_val_t{kLine}); }
  ScratchBuffer(const ScratchBuffer&) = delete;
  ScratchBuffer& operator=(const ScratchBuffer&) = delete;

  T* part(int64_t index) { return data_ + index * part_size_; }

 private:
  static constexpr std::size_t kLine = 64;
  static constexpr int64_t kLineElements = kLine / sizeof(T);
  int64_t part_size_;
  T* data_;
};

}  // namespace dtm_fast
