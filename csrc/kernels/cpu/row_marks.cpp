#include "row_marks.h"

#include <algorithm>

#include "float32_pieces.h"
#include "parallel_for.h"

namespace dtm_fast {

std::vector<RowMark> mark_small_rows_amx(const float* x, int64_t x_stride, int64_t M, int64_t K,
                                         int num_threads) {
  constexpr int64_t kRowsOfTask = 512;
  std::vector<RowMark> marks(static_cast<size_t>(M));
  parallel_for((M + kRowsOfTask - 1) / kRowsOfTask, num_threads, [&](int64_t task, int) {
    for (int64_t m = task * kRowsOfTask; m < std::min(M, (task + 1) * kRowsOfTask); ++m) {
      const float largest = largest_magnitude_amx(x + m * x_stride, K);
      marks[static_cast<size_t>(m)] = largest > 0 && largest < kSmallRow ? RowMark::kSmall : RowMark::kNone;
    }
  });
  return marks;
}

std::vector<int64_t> marked_rows(const std::vector<RowMark>& marks) {
  std::vector<int64_t> rows;
  for (size_t m = 0; m < marks.size(); ++m) {
    if (marks[m] != RowMark::kNone) rows.push_back(static_cast<int64_t>(m));
  }
  return rows;
}

void gather_rows(const float* x, int64_t x_stride, int64_t K, const int64_t* rows, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) std::copy_n(x + rows[i] * x_stride, K, to + i * K);
}

}  // namespace dtm_fast
