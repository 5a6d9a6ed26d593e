// masked_linear in float32 on AMX tiles, for more than a few rows of x.
#include "float32_panel_amx.h"
#include "mask_words_avx512.h"
#include "masked_linear_float32_store.h"

namespace dtm_fast {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The panels of a tile: blocks of K, then columns, then masks, so that the weight is read from memory once.
class MaskedPanels {
 public:
  struct Place {
    int64_t k0 = 0, panel = 0, v = 0;
  };

  MaskedPanels(const MaskedLinear& args, const Float32Tile& tile)
      : args_(args), tile_(tile), blocks_(args.K) {}

  const PieceBlocks& blocks() const { return blocks_; }
  int64_t count() const { return (tile_.cols + kStepRows - 1) / kStepRows; }
  int64_t depth(const Place& at) const { return blocks_.depth(at.k0); }
  int64_t slot(const Place& at) const { return at.v * count() + at.panel; }
  bool is_end(const Place& at) const { return at.k0 >= args_.K; }
  Place after(Place at) const {
    if (++at.v < tile_.variants) return at;
    at.v = 0;
    if (++at.panel < count()) return at;
    return {blocks_.after(at.k0), 0, 0};
  }

  const float* weights(const Place& at, int64_t j) const {
    return static_cast<const float*>(args_.weight) + row(at, j) * args_.weight_stride + at.k0;
  }
  __mmask32 kept(const Place& at, int64_t j, int64_t k) const {
    if (at.panel * kStepRows + j >= tile_.cols) return 0;
    const uint8_t* mask =
        args_.mask + (tile_.v0 + at.v) * args_.mask_variant_stride + row(at, j) * args_.mask_row_stride;
    const int64_t bit = at.k0 + k;
    return bit + kBfloat16Step <= args_.K ? mask_bits(mask, bit) : mask_bits_to_end(mask, bit, args_.K);
  }

 private:
  int64_t row(const Place& at, int64_t j) const {
    return tile_.n0 + smaller(at.panel * kStepRows + j, tile_.cols - 1);
  }

  const MaskedLinear& args_;
  const Float32Tile& tile_;
  const PieceBlocks blocks_;
};

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
  const MaskedPanels panels(args, tile);
  const int64_t groups = (tile.rows + kBfloat16Group - 1) / kBfloat16Group;
  const int64_t sums_of_panel = groups * kGroupSums;
  if (args.K == 0) {
    const int64_t count = tile.variants * panels.count() * sums_of_panel;
    std::memset(scratch.sums, 0, static_cast<size_t>(count) * sizeof(float));
  }
  const auto block_of_x = [&](const MaskedPanels::Place& at) {
    if (at.panel == 0 && at.v == 0) pack_block(args, tile, at.k0, panels.depth(at), scratch.block_of_x);
    return scratch.block_of_x;
  };
  // All sums are stored at the end, so that rows of y are written in one go.
  const auto complete = [](const MaskedPanels::Place&, int64_t, int64_t, const float*) {};
  multiply_panels(panels, groups, block_of_x, scratch.sums, scratch.of_eight, complete);
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
