#include "select_threatened.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace dtm_fast {
namespace {

// A set of tokens as a byte each, so that marking one is one store.
class TokenSet {
 public:
  explicit TokenSet(int64_t V) : V_(V), marks_(static_cast<size_t>((V + kWord - 1) / kWord * kWord)) {}

  void insert(int64_t token) {
    if (token < 0 || token >= V_) throw std::out_of_range("certificate: a token is not in the vocabulary");
    marks_[static_cast<size_t>(token)] = 1;
  }

  // Writes the tokens in ascending order and returns how many there are.
  int64_t list(int64_t* tokens) const {
    int64_t count = 0;
    for (size_t first = 0; first < marks_.size(); first += kWord) {
      uint64_t word;
      std::memcpy(&word, marks_.data() + first, kWord);
      if (word == 0) continue;  // nearly all are
      for (size_t i = 0; i < kWord; ++i) {
        if (marks_[first + i] != 0) tokens[count++] = static_cast<int64_t>(first + i);
      }
    }
    return count;
  }

 private:
  static constexpr int64_t kWord = sizeof(uint64_t);
  int64_t V_;
  std::vector<uint8_t> marks_;
};

}  // namespace

SelectedCounts select_threatened(const SelectThreatened& args) {
  SelectedCounts counts = {};
  TokenSet set(args.V);
  for (int64_t p = 0; p < args.P; ++p) {
    if (args.threats[p] < args.least || args.threats[p] > args.most) continue;
    args.positions[counts.positions++] = p;
    set.insert(args.top[p]);
    set.insert(args.reference[p]);
    for (int64_t i = 0; i < args.threats[p]; ++i) set.insert(args.nearest[p * args.K + i]);
  }
  if (counts.positions == 0) return counts;
  counts.tokens = set.list(args.tokens);
  for (int64_t i = 0; i < counts.positions; ++i) {
    const int64_t reference = args.reference[args.positions[i]];
    args.own[i] = std::lower_bound(args.tokens, args.tokens + counts.tokens, reference) - args.tokens;
  }
  return counts;
}

}  // namespace dtm_fast
