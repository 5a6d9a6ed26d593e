// A program that ThreadSanitizer must complain of: tasks of parallel_for that are not independent.
#include <cstdint>
#include <cstdio>

#include "../kernels/cpu/parallel_for.h"

int main() {
  int64_t sum = 0;
  dtm_fast::parallel_for(8, 2, [&](int64_t task, int) { sum += task; });
  std::printf("%lld\n", static_cast<long long>(sum));
}
