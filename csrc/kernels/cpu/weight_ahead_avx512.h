// What is asked of memory while 16 weight rows are multiplied. Included only by files compiled for at least
// AVX-512; everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction
// set.
#pragma once

#include "gemm_panel_avx512.h"
#include "masked_few_tokens.h"

namespace dtm_fast {
namespace {

// Two times 16 rows, those at hand and the next, share the second-level cache.
constexpr int64_t kLongestRun = 20 * 1024;

inline Fetch possible_fetch(Fetch wanted, const GemmTile& tile) {
  const bool fits = tile.weight_stride == tile.K && tile.K * size_of(tile.type) <= kLongestRun;
  return fits ? wanted : Fetch::kNextVectors;
}

// Asks one level of cache for a line. Which level is known only while running: a test that always ends alike
// costs less than kernels for each.
DTM_FAST_INLINE void fetch_line(const char* line, bool first_level) {
  first_level ? _mm_prefetch(line, _MM_HINT_T0) : _mm_prefetch(line, _MM_HINT_T1);
}

// Sixteen lines of memory to ask for, `step` bytes apart.
struct LinesAhead {
  DTM_FAST_INLINE void fetch(int64_t i) const { fetch_line(first + i * step, first_level); }

  const char* first;
  int64_t step;
  bool first_level;
};

// As runs: the next 16 rows and their masks, one row after the other. Which cache is asked for them matters
// though they only pass through the first one: on a Zen 5, prefetching to the second level reached three
// quarters of the bandwidth; on a Zen 4, prefetching to the first level took up to 1.6 times as long.
// Otherwise the same rows some vectors further.
template <FloatType type>
class WeightAhead {
 public:
  // weight_wanted: of several passes over the same rows one asks for the weight, each for its own mask.
  WeightAhead(const GemmTile& tile, const SixteenRows& w, int64_t j0, bool weight_wanted, Fetch fetch)
      : runs_(fetch != Fetch::kNextVectors),
        first_level_(fetch == Fetch::kRunsToFirstLevel),
        more_(runs_ && j0 + 16 < tile.cols),
        step_(runs_ ? (more_ && weight_wanted ? 64 : 0) : w.weight_bytes),
        weight_(w.weight + (runs_ && step_ != 0 ? 16 * w.weight_bytes : 0)),
        mask_(reinterpret_cast<const char*>(w.mask) + (more_ ? 16 * w.mask_bytes : 0)),
        K_(w.K) {}

  // Before the first 16 rows of a tile, for which nobody has asked.
  static void start(const GemmTile& tile, Fetch fetch) {
    if (fetch == Fetch::kNextVectors) return;
    const int64_t rows = tile.cols < 16 ? tile.cols : 16;
    const bool first_level = fetch == Fetch::kRunsToFirstLevel;
    fetch_all(tile.weight, rows * tile.K * size_of(type), first_level);
    for (int64_t v = 0; v < tile.variants; ++v) {
      fetch_all(tile.mask + v * tile.mask_variant_stride, rows * tile.mask_row_stride, first_level);
    }
  }

  // Together with the vectors at k.
  DTM_FAST_INLINE LinesAhead lines(int64_t k) const {
    if (more_) _mm_prefetch(mask_ + 16 * (k / 8), _MM_HINT_T0);
    if (runs_) return {weight_ + 16 * (k / kVectorK<type>)*step_, step_, first_level_};
    constexpr int64_t kAhead = 8;
    const int64_t at = k + kAhead * kVectorK<type>;
    const int64_t next_rows = at < K_ ? 0 : 16 * step_ - K_ * size_of(type);
    return {weight_ + at * size_of(type) + next_rows, step_, false};
  }

 private:
  DTM_FAST_INLINE static void fetch_all(const void* data, int64_t bytes, bool first_level) {
    const char* from = static_cast<const char*>(data);
    for (int64_t i = 0; i < bytes; i += 64) fetch_line(from + i, first_level);
  }

  bool runs_, first_level_, more_;
  int64_t step_;
  const char *weight_, *mask_;
  int64_t K_;
};

}  // namespace
}  // namespace dtm_fast
