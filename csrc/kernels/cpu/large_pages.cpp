#include "large_pages.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>

#include "parallel_for.h"
#endif

namespace dtm_fast {

#if defined(__linux__)

void populate_large_pages(void* data, int64_t bytes, int num_threads) {
  constexpr int64_t kLargePage = 2 << 20;
  constexpr int64_t kAlwaysFresh = 32 << 20;  // mallopt(3): from here on malloc maps every block anew
  constexpr int kPopulateWrite = 23;          // MADV_POPULATE_WRITE of Linux 5.14; older headers lack it
  if (bytes < kAlwaysFresh) return;
  char* bytes_begin = static_cast<char*>(data);
  const auto address = reinterpret_cast<uintptr_t>(data);
  char* first = bytes_begin + (kLargePage - static_cast<int64_t>(address % kLargePage)) % kLargePage;
  const int64_t pages = (bytes_begin + bytes - first) / kLargePage;
  if (madvise(first, static_cast<size_t>(pages * kLargePage), MADV_HUGEPAGE) != 0) return;
  // One run of pages per thread: neighbouring faults of two threads wait for each other.
  const int64_t share = (pages + num_threads - 1) / num_threads;
  parallel_for(num_threads, num_threads, [&](int64_t task, int) {
    const int64_t count = std::min(share, pages - task * share);
    if (count <= 0) return;
    // Where this fails, the pages come with the first write.
    (void)madvise(first + task * share * kLargePage, static_cast<size_t>(count * kLargePage), kPopulateWrite);
  });
}

#else

void populate_large_pages(void*, int64_t, int) {}

#endif

}  // namespace dtm_fast
