// masked_linear in float32 on AMX tiles, for more than a few rows of x. A panel, the masked pieces of 32
// weight rows in a block of K, stays in the first-level cache while the packed block of x passes by.
// Meanwhile the vectors copy the next panel and add the sums of the block before.
#include "float32_panel_amx.h"
#include "mask_words_avx512.h"
#include "masked_linear_float32_store.h"

namespace dtm_fast {
namespace {

// Of the rows of a panel, in elements: an odd number of cache lines, so that the 16 lines of a tile lie in 16
// different cache sets.
constexpr int64_t kPanelStride = kLongestPieceBlock + kBfloat16Step;
constexpr int64_t kPanelPiece = kStepRows * kPanelStride;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Which panel: block of K, then columns, then mask, so that the weight is read from memory once.
struct Place {
  int64_t k0 = 0, panel = 0, v = 0;
};

// The panels of a tile.
class Panels {
 public:
  Panels(const MaskedLinear& args, const Float32Tile& tile)
      : args_(args), tile_(tile), most_depth_(piece_block_depth(args.K)) {}

  int64_t count() const { return (tile_.cols + kStepRows - 1) / kStepRows; }
  int64_t depth(const Place& at) const { return smaller(most_depth_, args_.K - at.k0); }
  bool is_end(const Place& at) const { return at.k0 >= args_.K; }
  Place after(Place at) const {
    if (++at.v < tile_.variants) return at;
    at.v = 0;
    if (++at.panel < count()) return at;
    return {at.k0 + most_depth_, 0, 0};
  }

  // Weights of row j of a panel, or the last one there is.
  const float* weights(const Place& at, int64_t j) const {
    return static_cast<const float*>(args_.weight) + row(at, j) * args_.weight_stride + at.k0;
  }
  const uint8_t* mask(const Place& at, int64_t j) const {
    return args_.mask + (tile_.v0 + at.v) * args_.mask_variant_stride + row(at, j) * args_.mask_row_stride;
  }
  bool has_row(const Place& at, int64_t j) const { return at.panel * kStepRows + j < tile_.cols; }
  int64_t K() const { return args_.K; }

 private:
  int64_t row(const Place& at, int64_t j) const {
    return tile_.n0 + smaller(at.panel * kStepRows + j, tile_.cols - 1);
  }

  const MaskedLinear& args_;
  const Float32Tile& tile_;
  const int64_t most_depth_;
};

// Copies a panel row by row: to [kFloat32Pieces, 32, kPanelStride] = the pieces of the weights, masked; zero
// beyond. Asks the cache for the panel after it.
class PanelCopy {
 public:
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
    const uint8_t* mask = panels_.mask(at_, j);
    const int64_t depth = panels_.depth(at_), K = panels_.K();
    for (int64_t k = 0; k < depth; k += kBfloat16Step) {
      _mm_prefetch(reinterpret_cast<const char*>(next + k), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(next + k + 16), _MM_HINT_T1);
      const int64_t bit = at_.k0 + k;
      const __mmask32 there = first_words(depth - k);
      __mmask32 kept = 0;
      if (panels_.has_row(at_, j)) {
        kept = bit + kBfloat16Step <= K ? mask_bits(mask, bit) : mask_bits_to_end(mask, bit, K);
      }
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

// Sums of a block of K that are still to be added to those before.
struct Pending {
  const float* from = nullptr;
  float* to = nullptr;
  int64_t count = 0;
};

// sums of kGroups neighbouring groups = panel times x. With each step a share of what is pending is added,
// and `rows` rows of the next panel are copied.
template <int kGroups>
void multiply_groups(const uint16_t* panel, int64_t depth, const uint16_t* x, int64_t group_size, float* sums,
                     const Pending& pending, PanelCopy& next, int64_t rows) {
  constexpr int64_t kShare = kGroupSums / 2;
  int64_t added = 0;
  finish_writes(panel);
  zero_sums();
  for (int64_t k = 0; k < depth; k += kBfloat16Step, x += kStepOfX) {
    const StepOfWeight step = {panel + k, kPanelPiece, kStepRows / 2 * kPanelStride, kPanelStride * 2};
#pragma GCC unroll 6
    for (int p = 0; p < kPieceProducts; ++p) add_product<kGroups>(p, step, x, group_size);
    next.copy_rows(rows);
    if (added == pending.count) continue;
    add_to(pending.from + added, kShare, pending.to + added);
    added += kShare;
  }
  if (added < pending.count) add_to(pending.from + added, pending.count - added, pending.to + added);
  store_sums<kGroups>(sums);
}

// The block of K at k0 of the rows of a tile, packed.
void pack_block(const MaskedLinear& args, const Float32Tile& tile, int64_t k0, int64_t depth,
                uint16_t* packed) {
  for (int64_t i = 0; i < tile.rows; i += kBfloat16Group, packed += piece_group_size(depth)) {
    const float* x = static_cast<const float*>(args.x) + (tile.m0 + i) * args.x_stride + k0;
    pack_float32_group_amx(x, args.x_stride, smaller(kBfloat16Group, tile.rows - i), depth, packed);
  }
}

}  // namespace

void masked_linear_float32_amx(const MaskedLinear& args, const Float32Tile& tile,
                               const Float32Scratch& scratch) {
  const TilesInUse tiles;
  const DenormalsAreZero denormals_are_zero;
  alignas(64) uint16_t buffers[2][kFloat32Pieces * kPanelPiece];
  alignas(64) float blocks[2][2 * kGroupSums];
  const Panels panels(args, tile);
  const int64_t groups = (tile.rows + kBfloat16Group - 1) / kBfloat16Group;
  const int64_t sums_of_panel = groups * kGroupSums;
  if (args.K == 0) {
    const int64_t count = tile.variants * panels.count() * sums_of_panel;
    std::memset(scratch.sums, 0, static_cast<size_t>(count) * sizeof(float));
  }
  Pending pending;
  int turn = 0;
  Place at;
  PanelCopy(panels, at, buffers[0]).copy_rows(kStepRows);
  for (int buffer = 0; !panels.is_end(at); at = panels.after(at), buffer = 1 - buffer) {
    const int64_t depth = panels.depth(at), group_size = piece_group_size(depth);
    if (at.panel == 0 && at.v == 0) pack_block(args, tile, at.k0, depth, scratch.block_of_x);
    PanelCopy next(panels, panels.after(at), buffers[1 - buffer]);
    const int64_t times = (groups + 1) / 2 * ((depth + kBfloat16Step - 1) / kBfloat16Step),
                  rows = (kStepRows + times - 1) / times;
    float* const sums = scratch.sums + (at.v * panels.count() + at.panel) * sums_of_panel;
    for (int64_t g = 0; g < groups; g += 2, turn = 1 - turn) {
      float* const own = sums + g * kGroupSums;
      float* const to = at.k0 == 0 ? own : blocks[turn];
      const int64_t together = smaller(2, groups - g);
      const auto multiply = together == 2 ? multiply_groups<2> : multiply_groups<1>;
      multiply(buffers[buffer], depth, scratch.block_of_x + g * group_size, group_size, to, pending, next,
               rows);
      pending = {to, own, at.k0 == 0 ? 0 : together * kGroupSums};
    }
  }
  add_to(pending.from, pending.count, pending.to);
  for (int64_t v = 0; v < tile.variants; ++v) {
    for (int64_t i = 0; i < tile.rows; i += kBfloat16Group) {
      const int64_t rows = smaller(kBfloat16Group, tile.rows - i);
      for (int64_t p = 0; p < panels.count(); ++p) {
        const int64_t j = p * kStepRows, cols = smaller(kStepRows, tile.cols - j);
        const float* sums =
            scratch.sums + (v * panels.count() + p) * sums_of_panel + i / kBfloat16Group * kGroupSums;
        store_float32_block(args, tile.v0 + v, tile.m0 + i, rows, tile.n0 + j, cols, sums, tile.marks + i);
      }
    }
  }
}

}  // namespace dtm_fast
