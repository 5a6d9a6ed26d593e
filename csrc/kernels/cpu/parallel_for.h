// The one place that knows OpenMP. Only for files compiled for the baseline.
//
// No RPATH to an OpenMP runtime is set: torch ships libgomp.so.1 under the same SONAME, so once torch is
// imported (dtm_fast.ops imports it first) this library shares torch's runtime and its threads.
//
// DTM_FAST_STD_THREADS is for ThreadSanitizer, which does not see the OpenMP runtime's barriers (GCC's is not
// instrumented): plain threads in its stead, every one of which certainly gets some of the tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#if defined(DTM_FAST_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace dtm_fast {

// How many threads parallel_for uses at most, hence how many scratch buffers a caller needs.
inline int threads_used(int64_t tasks, int num_threads) {
#if defined(DTM_FAST_STD_THREADS) || defined(_OPENMP)
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tasks, num_threads)));
#else
  (void)tasks, (void)num_threads;
  return 1;
#endif
}

// Calls run(task, thread) once for every task in [0, tasks), 0 <= thread < threads_used(tasks, num_threads).
// Tasks must be independent of each other: which thread runs one, and when, is not fixed.
template <typename Run>
void parallel_for(int64_t tasks, int num_threads, const Run& run) {
#if defined(DTM_FAST_STD_THREADS)
  const int threads = threads_used(tasks, num_threads);
  const auto every_so_many = [&](int thread) {
    for (int64_t task = thread; task < tasks; task += threads) run(task, thread);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(every_so_many, thread);
  every_so_many(0);
  for (std::thread& each : others) each.join();
#else
#ifdef _OPENMP
  const int threads = threads_used(tasks, num_threads);
  if (threads > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) run(task, omp_get_thread_num());
    return;
  }
#endif
  (void)num_threads;
  for (int64_t task = 0; task < tasks; ++task) run(task, 0);
#endif
}

}  // namespace dtm_fast
