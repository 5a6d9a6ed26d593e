// Packing the kept entries of a weight, as sparse_format.h says, in two steps: the first tells how much the
// second needs.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "sparse_format.h"

namespace dtm_fast {

// mask  : [N, ceil(K / 8)] bits, lowest first, row stride mask_stride; bits beyond K are not looked at
// rows, steps : the arrays of SparseWeight
struct SparseOrder {
  const uint8_t* mask;
  int64_t mask_stride;
  int64_t N, K;
  uint16_t* rows;
  uint8_t* steps;
};

// Writes rows and steps.
void sparse_order(const SparseOrder& args, int num_threads);

// weight : [N, K] of type, row stride weight_stride
// values, columns : the arrays of SparseWeight, of the lengths that steps give
struct SparsePack {
  FloatType type;
  const void* weight;
  int64_t weight_stride;
  SparseOrder order;  // as sparse_order left it
  float* values;
  uint8_t* columns;
};

// Writes values and columns.
void sparse_pack(const SparsePack& args, int num_threads);

// Where a block of a panel begins: its first line of values and of columns.
struct SparseStart {
  int64_t step, word;
};

// starts [panels * blocks + 1]; the last is the end.
void sparse_starts(const SparseLayout& layout, const uint8_t* steps, SparseStart* starts);

// The part of sparse_pack that block `index` of [panels, blocks] is, at `start` of values and columns.
void sparse_pack_block(const SparsePack& args, int64_t index, const SparseStart& start);

}  // namespace dtm_fast
