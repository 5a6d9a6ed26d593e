// The positions of a stage of proofs, and the tokens that may win at any of them.
#pragma once

#include <cstdint>

namespace dtm_fast {

// threats   : [P] int64, what certificate_threats found
// top       : [P] int64 in [0, V), the base's tokens
// nearest   : [P, K] int64 in [0, V), the tokens that threaten a position, in this order
// reference : [P] int64 in [0, V)
//
// positions[i] = the i-th position with least <= threats <= most, for most <= K
// tokens[j]    = ascending: top, reference and the first `threats` of nearest of all these positions
// own[i]       = where the reference of positions[i] is among tokens
//
// There is room for P positions and V tokens. Throws std::out_of_range where a token is not in [0, V).
struct SelectThreatened {
  const int64_t* threats;
  const int64_t* top;
  const int64_t* nearest;
  const int64_t* reference;
  int64_t P, K, V;
  int64_t least, most;
  int64_t* positions;
  int64_t* tokens;
  int64_t* own;
};

struct SelectedCounts {
  int64_t positions, tokens;
};

SelectedCounts select_threatened(const SelectThreatened& args);

}  // namespace dtm_fast
