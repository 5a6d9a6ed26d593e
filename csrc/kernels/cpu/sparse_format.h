// A weight [N, K] of which only the kept entries are stored.
//
// The weight is cut into panels of panel_rows rows and blocks of kSparseBlock columns. Within a block of a
// panel the rows are sorted by their number of kept entries, descending and stable, and taken in groups of
// kSparseLanes, so that the rows of a group have nearly equally many: all have as many steps, and the loops
// over them a trip count that can be predicted. Step s of a group is the s-th kept entry of each of its rows,
// in ascending order of the columns; rows that have fewer are padded with value 0 at column kSparseBlock,
// where the kernels have x = 0. Groups, then blocks, then panels follow each other.
//
// The sorted groups are those of SELL-C-sigma (Kreutzer et al., SIAM J. Sci. Comput. 36(5), 2014), here
// within blocks of columns, so that the part of x that a block needs stays in the L1 cache or in registers.
#pragma once

#include <cstdint>

namespace dtm_fast {

static constexpr int64_t kSparseBlock = 127;  // with the column of the padding 128: eight vectors of 16 lanes
static constexpr int64_t kSparseLanes = 16;
static constexpr int64_t kSparseMostPanelRows = 512;
static constexpr int64_t kSparseWord = 4;  // columns of a row side by side

// values  : [steps of all groups, kSparseLanes]
// columns : [words of all groups, kSparseLanes, kSparseWord], a group with s steps having ceil(s /
// kSparseWord) rows    : [panels, blocks, panel_rows], the row within the panel; panel_rows for a row beyond
// N steps   : [panels, blocks, panel_rows / kSparseLanes]
struct SparseWeight {
  const float* values;
  int64_t value_steps;
  const uint8_t* columns;
  int64_t column_words;
  const uint16_t* rows;
  const uint8_t* steps;
  int64_t N, K;
};

// How a weight is cut: panels of equal size, as few as possible.
struct SparseLayout {
  int64_t panels, panel_rows, groups, blocks;
};

static inline SparseLayout sparse_layout(int64_t N, int64_t K) {
  const int64_t panels = (N + kSparseMostPanelRows - 1) / kSparseMostPanelRows;
  const int64_t share = panels == 0 ? 0 : (N + panels * kSparseLanes - 1) / (panels * kSparseLanes);
  return {panels, share * kSparseLanes, share, (K + kSparseBlock - 1) / kSparseBlock};
}

}  // namespace dtm_fast
