// What is asked of memory while 16 weight rows are multiplied. Included only by files compiled for at least
// AVX-512; everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction
// set.
#pragma once

#include "gemm_panel_avx512.h"

namespace dtm_fast {
namespace {

// Two times 16 rows, those at hand and the next, share the second-level cache.
constexpr int64_t kLongestRun = 20 * 1024;

inline bool fits_runs(const GemmTile& tile) {
  return tile.weight_stride == tile.K && tile.K * size_of(tile.type) <= kLongestRun;
}

DTM_FAST_INLINE void fetch_all(const void* data, int64_t bytes) {
  const char* from = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T0);
}

// The next 16 rows and their masks, one row after the other. The first-level cache is asked for them though
// they only pass through it: on a Zen 5, prefetching to the second level reached three quarters of the
// bandwidth.
template <FloatType type>
class NextRows {
 public:
  static constexpr bool kRuns = true;

  // weight_wanted: of several passes over the same rows one asks for the weight, each for its own mask.
  NextRows(const GemmTile& tile, const SixteenRows& w, int64_t j0, bool weight_wanted)
      : more_(j0 + 16 < tile.cols),
        weight_step_(more_ && weight_wanted ? 64 : 0),
        weight_(w.weight + (weight_step_ != 0 ? 16 * w.weight_bytes : 0)),
        mask_(reinterpret_cast<const char*>(w.mask) + (more_ ? 16 * w.mask_bytes : 0)) {}

  // Before the first 16 rows of a tile, for which nobody has asked.
  DTM_FAST_INLINE static void start(const GemmTile& tile) {
    const int64_t rows = tile.cols < 16 ? tile.cols : 16;
    fetch_all(tile.weight, rows * tile.K * size_of(type));
    for (int64_t v = 0; v < tile.variants; ++v) {
      fetch_all(tile.mask + v * tile.mask_variant_stride, rows * tile.mask_row_stride);
    }
  }

  // Together with the vectors at k.
  Lines<_MM_HINT_T0> lines(int64_t k) const {
    if (more_) _mm_prefetch(mask_ + 16 * (k / 8), _MM_HINT_T0);
    const int64_t vector = k / kVectorK<type>;
    return {weight_ + 16 * vector * weight_step_, weight_step_};
  }

 private:
  bool more_;
  int64_t weight_step_;
  const char *weight_, *mask_;
};

// The same rows some vectors further.
template <FloatType type>
class NextVectors {
 public:
  static constexpr bool kRuns = false;

  NextVectors(const GemmTile&, const SixteenRows& w, int64_t, bool) : w_(w) {}

  DTM_FAST_INLINE static void start(const GemmTile&) {}

  Lines<_MM_HINT_T1> lines(int64_t k) const {
    constexpr int64_t kAhead = 8;
    const int64_t at = k + kAhead * kVectorK<type>;
    const int64_t next_rows = 16 * w_.weight_bytes - w_.K * size_of(type);
    return {w_.weight + at * size_of(type) + (at < w_.K ? 0 : next_rows), w_.weight_bytes};
  }

 private:
  const SixteenRows& w_;
};

}  // namespace
}  // namespace dtm_fast
