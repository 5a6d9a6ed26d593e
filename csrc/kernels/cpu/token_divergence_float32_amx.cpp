// Product and reduction of a tile of logits in float32 in pieces, see float32_pieces.h. The tokens of a tile
// are taken in parts, whose sums, of all rows, stay in the second-level cache while blocks of D follow each
// other; with the last block they are complete, and go no further than into what is known of their rows.
#include "exp_sum_amx.h"
#include "float32_panel_amx.h"
#include "logit_rows_amx.h"

namespace dtm_fast {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
constexpr int64_t kPartPanels = kWidePartTokens / kStepRows;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The state of 16 rows.
struct alignas(64) Float32Rows {
  float max[16];    // the largest logit; -infinity before the first
  float least[16];  // the smallest one
  float sum[16];    // sum exp(logit - max), NaN if a logit is NaN or infinity
  int32_t reference[16];

  static float rounded(float logit) { return logit; }
  float sum_of_row(int64_t row) const { return sum[row]; }
  bool all_finite(int64_t row) const { return sum[row] == sum[row] && least[row] > -kInfinity; }
};

void start(const WideTile& tile, int64_t first_row, Float32Rows& rows) {
  _mm512_store_ps(rows.max, _mm512_set1_ps(-kInfinity));
  _mm512_store_ps(rows.least, _mm512_set1_ps(kInfinity));
  _mm512_store_ps(rows.sum, _mm512_setzero_ps());
  find_references(tile, first_row, rows.reference);
}

// Adds the logits of a panel [tokens, 16].
void add_logits(const float* logits, int64_t tokens, Float32Rows& rows) {
  __m512 largest = _mm512_load_ps(rows.max), least = _mm512_load_ps(rows.least);
  const __m512 before = largest;
  for (int64_t j = 0; j < tokens; ++j) {
    const __m512 logit = _mm512_load_ps(logits + j * 16);
    largest = _mm512_max_ps(largest, logit);
    least = _mm512_min_ps(least, logit);
  }
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t j = 0;
  for (; j + 2 <= tokens; j += 2) {
    sums[0] = _mm512_add_ps(sums[0], exp_term(_mm512_sub_ps(_mm512_load_ps(logits + j * 16), largest)));
    sums[1] = _mm512_add_ps(sums[1], exp_term(_mm512_sub_ps(_mm512_load_ps(logits + j * 16 + 16), largest)));
  }
  if (j < tokens) {
    sums[0] = _mm512_add_ps(sums[0], exp_term(_mm512_sub_ps(_mm512_load_ps(logits + j * 16), largest)));
  }
  const __m512 factor = exp_term(_mm512_sub_ps(before, largest));
  _mm512_store_ps(rows.sum,
                  _mm512_fmadd_ps(_mm512_load_ps(rows.sum), factor, _mm512_add_ps(sums[0], sums[1])));
  _mm512_store_ps(rows.max, largest);
  _mm512_store_ps(rows.least, least);
}

// The panels of a tile: parts of its tokens, then blocks of D, then tokens.
class HeadPanels {
 public:
  struct Place {
    int64_t k0 = 0, panel = 0;
  };

  explicit HeadPanels(const WideTile& tile) : tile_(tile), blocks_(tile.D) {}

  int64_t count() const { return (tile_.tokens + kStepRows - 1) / kStepRows; }
  int64_t depth(const Place& at) const { return blocks_.depth(at.k0); }
  bool is_end(const Place& at) const { return at.panel >= count(); }
  Place after(const Place& at) const {
    const int64_t part = at.panel / kPartPanels * kPartPanels, end = smaller(part + kPartPanels, count());
    if (at.panel + 1 < end) return {at.k0, at.panel + 1};
    if (!blocks_.is_last(at.k0)) return {blocks_.after(at.k0), part};
    return {0, end};
  }

  const PieceBlocks& blocks() const { return blocks_; }
  int64_t slot(const Place& at) const { return at.panel % kPartPanels; }
  int64_t tokens(const Place& at) const { return smaller(kStepRows, tile_.tokens - at.panel * kStepRows); }
  const float* weights(const Place& at, int64_t j) const {
    const int64_t token = smaller(at.panel * kStepRows + j, tile_.tokens - 1);
    return static_cast<const float*>(tile_.lm_head) + token * tile_.lm_head_stride + at.k0;
  }
  __mmask32 kept(const Place& at, int64_t j, int64_t /*k*/) const {
    return at.panel * kStepRows + j < tile_.tokens ? ~__mmask32{0} : 0;
  }

 private:
  const WideTile& tile_;
  const PieceBlocks blocks_;
};

}  // namespace

void summarize_float32_tile_amx(const WideTile& tile) {
  const TilesInUse tiles;
  const DenormalsAreZero denormals_are_zero;
  Float32Rows state[kWideTileRows / kBfloat16Group];
  const HeadPanels panels(tile);
  const int64_t groups = (tile.rows + kBfloat16Group - 1) / kBfloat16Group;
  for (int64_t g = 0; g < groups; ++g) start(tile, g * kBfloat16Group, state[g]);
  const auto block_of_hidden = [&](const HeadPanels::Place& at) {
    return tile.hidden + groups * piece_group_size(at.k0);
  };
  const auto complete = [&](const HeadPanels::Place& at, int64_t g, int64_t count, const float* logits) {
    for (int64_t end = g + count; g < end; ++g, logits += kGroupSums) {
      note_references(tile, at.panel * kStepRows, panels.tokens(at), g * kBfloat16Group, logits, state[g]);
      add_logits(logits, panels.tokens(at), state[g]);
    }
  };
  multiply_panels(panels, groups, block_of_hidden, tile.sums, tile.of_eight, complete);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Float32Rows& rows = state[i / kBfloat16Group];
    tile.max[i] = rows.all_finite(i % kBfloat16Group) ? rows.max[i % kBfloat16Group] : kNan;
    tile.sum_exp[i] = rows.sum[i % kBfloat16Group];
  }
}

}  // namespace dtm_fast
