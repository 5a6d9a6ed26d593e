// Panels of float32 in pieces, see float32_pieces.h: a panel, the pieces of 32 weight rows in a block of K,
// stays in the first-level cache while packed rows of x pass by. Meanwhile the vectors copy the next panel
// and add the sums of the block before. Included only by files compiled for AMX; everything is in an
// anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include "float32_steps_amx.h"

namespace dtm_fast {
namespace {

// Of the rows of a panel, in elements: an odd number of cache lines, so that the 16 lines of a tile lie in 16
// different cache sets.
constexpr int64_t kPanelStride = kLongestPieceBlock + kBfloat16Step;
constexpr int64_t kPanelPiece = kStepRows * kPanelStride;
constexpr int64_t kPanelSize = kFloat32Pieces * kPanelPiece;

// Copies a panel row by row: to [kFloat32Pieces, 32, kPanelStride] = the pieces of the weights that are kept;
// zero beyond. Asks the cache for the panel after it. Panels is a sequence of panels, in which
//
//   Panels::Place     names one of them
//   after(at)         is the place after it
//   is_end(at)        tells whether it is behind the last
//   depth(at)         elements of its rows, a multiple of kBfloat16Step but at the end of K
//   weights(at, j)    row j, or any other if there is none
//   kept(at, j, k)    which of 32 elements from k on count: a bit each
template <typename Panels>
class PanelCopy {
 public:
  using Place = typename Panels::Place;

  PanelCopy(const Panels& panels, const Place& at, uint16_t* to)
      : panels_(panels),
        at_(at),
        after_(panels.after(at)),
        to_(to),
        left_(panels.is_end(at) ? 0 : kStepRows) {}

  DTM_FAST_INLINE void copy_rows(int64_t count) {
    for (; count > 0 && left_ > 0; --count) copy_row(kStepRows - left_--);
  }

 private:
  DTM_FAST_INLINE void copy_row(int64_t j) {
    const float* from = panels_.weights(at_, j);
    const float* next = panels_.is_end(after_) ? from : panels_.weights(after_, j);
    const int64_t depth = panels_.depth(at_);
    for (int64_t k = 0; k < depth; k += kBfloat16Step) {
      _mm_prefetch(reinterpret_cast<const char*>(next + k), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(next + k + 16), _MM_HINT_T1);
      const __mmask32 there = first_words(depth - k);
      const __mmask32 kept = panels_.kept(at_, j, k);
      const Float32Pieces pieces = load_weights(from + k, there);
#pragma GCC unroll 3
      for (int p = 0; p < kFloat32Pieces; ++p) {
        _mm512_store_si512(to_ + p * kPanelPiece + j * kPanelStride + k, pairs_of(pieces, p, there & kept));
      }
    }
  }

  const Panels& panels_;
  const Place at_, after_;
  uint16_t* const to_;
  int64_t left_;
};

// Rows of a panel to copy with each of its own steps, so that the next one is there when groups are done.
inline int64_t rows_per_step(int64_t groups, int64_t depth) {
  const int64_t steps = (groups + 1) / 2 * ((depth + kBfloat16Step - 1) / kBfloat16Step);
  return (kStepRows + steps - 1) / steps;
}

// sums of kGroups neighbouring groups = panel times x. With each step a share of what is pending is added,
// and `rows` rows of the next panel are copied.
template <int kGroups, typename Panels>
void multiply_groups(const uint16_t* panel, int64_t depth, const uint16_t* x, int64_t group_size, float* sums,
                     const Pending& pending, PanelCopy<Panels>& next, int64_t rows) {
  constexpr int64_t kShare = kGroupSums / 2;
  int64_t added = 0;
  finish_writes(panel);
  zero_sums();
  for (int64_t k = 0; k < depth; k += kBfloat16Step, x += kStepOfX) {
    const StepOfWeight step = {panel + k, kPanelPiece, kStepRows / 2 * kPanelStride, kPanelStride * 2};
#pragma GCC unroll 6
    for (int p = 0; p < kPieceProducts; ++p) add_product<kGroups>(p, step, {x, group_size});
    next.copy_rows(rows);
    if (added == pending.count) continue;
    add(pending, added, added + kShare);
    added += kShare;
  }
  add(pending, added, pending.count);
  store_sums<kGroups>(sums);
}

// The sums of all panels and of `groups` groups of x. Panels also has
//
//   blocks()          of K
//   slot(at)          where among the sums those of the panel are: with those of others that are complete, or
//                     have been used, they may share a slot
//
// block_of_x(at) gives the packed groups of the block of a panel; all and of_eight are [slots, groups, 32,
// 16], of_eight nullptr if K is one eight of blocks. Calls complete(at, g, count, sums) for each panel
// and its groups g .. g + count - 1 when their sums are complete.
template <typename Panels, typename BlockOfX, typename Complete>
void multiply_panels(const Panels& panels, int64_t groups, const BlockOfX& block_of_x, float* all,
                     float* of_eight, const Complete& complete) {
  using Place = typename Panels::Place;
  alignas(64) uint16_t copies[2][kPanelSize];
  alignas(64) float buffers[2][2 * kGroupSums];
  struct Before {
    Place at;
    int64_t g = 0, count = 0;
    const float* sums = nullptr;
    Pending pending;
  } before;
  const auto finish = [&] {
    if (before.count > 0 && panels.blocks().is_last(before.at.k0)) {
      complete(before.at, before.g, before.count, before.sums);
    }
  };
  Place at;
  PanelCopy<Panels>(panels, at, copies[0]).copy_rows(kStepRows);
  for (int turn = 0, sums_turn = 0; !panels.is_end(at); at = panels.after(at), turn = 1 - turn) {
    const int64_t depth = panels.depth(at), group_size = piece_group_size(depth);
    const int64_t rows = rows_per_step(groups, depth);
    const uint16_t* x = block_of_x(at);
    PanelCopy<Panels> next(panels, panels.after(at), copies[1 - turn]);
    for (int64_t g = 0; g < groups; g += 2, sums_turn = 1 - sums_turn, x += 2 * group_size) {
      const int64_t count = groups - g < 2 ? groups - g : 2;
      const int64_t own = (panels.slot(at) * groups + g) * kGroupSums;
      float* const own_of_eight = of_eight == nullptr ? nullptr : of_eight + own;
      const BlockSums sums = sums_of_block(panels.blocks(), at.k0, count * kGroupSums, all + own,
                                           own_of_eight, buffers[sums_turn]);
      const auto multiply = count == 2 ? multiply_groups<2, Panels> : multiply_groups<1, Panels>;
      multiply(copies[turn], depth, x, group_size, sums.to, before.pending, next, rows);
      finish();
      before = {at, g, count, all + own, sums.then};
    }
  }
  add(before.pending, 0, before.pending.count);
  finish();
}

}  // namespace
}  // namespace dtm_fast
