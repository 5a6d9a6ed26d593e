// What the kernels of masked_linear for few rows of x share on AMX: weight rows side by side under their
// masks. Included only by files compiled for AMX; everything is in an anonymous namespace, so that no copy
// can reach a file of a lower instruction set.
#pragma once

#include "avx512_vectors.h"
#include "bfloat16_tiles.h"
#include "masked_linear.h"

namespace dtm_fast {
namespace {

// How far ahead of its use each row of the weight is fetched: steps of K.
constexpr int64_t kStepsAhead = 3;
constexpr int64_t kMostTogether = 4;  // masks whose sums have a tile each

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Weight rows from n on, at most kMostRows, under the masks from v on.
template <typename Weight, int64_t kMostRows>
struct Strip {
  Strip(const MaskedLinear& args, int64_t n, int64_t strip_rows, int64_t v, bool comes_from_memory)
      : weight(static_cast<const Weight*>(args.weight) + n * args.weight_stride),
        weight_stride(args.weight_stride),
        mask(args.mask + v * args.mask_variant_stride + n * args.mask_row_stride),
        mask_stride(args.mask_row_stride),
        variant_stride(args.mask_variant_stride),
        rows(strip_rows),
        K(args.K),
        in_memory(comes_from_memory) {}

  // How far from a weight at k lies what is to be fetched with it: some steps, where a row ends the first
  // steps of the one that lies a strip further.
  int64_t ahead(int64_t k) const {
    constexpr int64_t kAhead = kStepsAhead * kBfloat16Step;
    return kAhead + (k + kAhead < K ? 0 : kMostRows * weight_stride - K);
  }

  // Fetches the share of a step of the next strip's masks, which usually follow without gaps.
  DTM_FAST_INLINE void fetch_next_mask(int64_t k, int64_t v) const {
    const uint8_t* share = mask + v * variant_stride + kMostRows * (mask_stride + k / 8);
    for (int64_t line = 0; line < kMostRows * kBfloat16Step / 8; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(share + line), _MM_HINT_T1);
    }
  }

  const Weight* weight;
  int64_t weight_stride;
  const uint8_t* mask;
  int64_t mask_stride, variant_stride;
  int64_t rows, K;
  bool in_memory;  // or in a cache, for it has just been multiplied under another mask
};

// Calls run(v, masks) for all variants, at most kMostTogether at a time, in passes as few and even as can be.
template <typename Run>
void for_each_pass(int64_t variants, const Run& run) {
  const int64_t passes = (variants + kMostTogether - 1) / kMostTogether;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t v = variants * pass / passes;
    run(v, variants * (pass + 1) / passes - v);
  }
}

}  // namespace
}  // namespace dtm_fast
