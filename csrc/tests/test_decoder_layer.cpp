#include <deque>
#include <limits>
#include <stdexcept>

#include "decoder_layer_twin.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

constexpr LayerArithmetic kArithmetics[] = {LayerArithmetic::kFloat32, LayerArithmetic::kBfloat16,
                                            LayerArithmetic::kChange, LayerArithmetic::kFineChange};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int64_t kLongest = 300;  // more keys than kGemmBlockK, more rows than go through the MLP together
constexpr int64_t kLengths[] = {1, 2, 13, 33, 100, kLongest};
constexpr int64_t kSequences = 6;

constexpr LayerSizes kSizes[] = {
    {20, 1, 1, 2, 32, false, false, false},  {33, 3, 1, 6, 160, true, true, false},
    {48, 4, 2, 10, 288, false, true, true},  {20, 4, 4, 16, 32, true, false, true},
    {33, 3, 3, 40, 160, false, false, true}, {48, 4, 1, 40, 288, true, true, false},
};
// Several blocks of K in every product, of pairs too; for few positions.
constexpr LayerSizes kWide = {560, 3, 1, 180, 1056, true, false, false};

// How far a row may be from the twin's, in units of its norm. A float32 sum is off by some 2^-24 of its
// terms' magnitude; some ten sums follow one another, and some cancel.
constexpr double kFloat32Error = 0x1p-24 * 32;
// The twin rounds at the same places, but where a sum lies near the middle of two numbers of bfloat16,
// float32 and double go different ways: 2^-8 of that element, and of what is computed from it.
constexpr double kBfloat16Error = 0x1p-7;
// ... which is rare: of all rows together hardly anything is left. Where one of the two did not round, or
// once more, it would be above 2^-9.
constexpr double kBfloat16ErrorOfAll = 0x1p-11;
// Differences and weights are rounded to bfloat16, 2^-9 each, independently in every product. In units of the
// norm of all rows: where the terms of a product cancel, its own norm is less than that of what is rounded.
constexpr double kChangeError = 0x1p-7;
// In two pieces they are rounded by 2^-17; what float32 loses of the base's own states comes on top.
constexpr double kFineChangeError = 0x1p-14;

bool is_any_change(LayerArithmetic arithmetic) {
  return arithmetic == LayerArithmetic::kChange || arithmetic == LayerArithmetic::kFineChange;
}

void run(CpuIsa isa, const PackedLayer& packed, const SequencePart& part) {
  decoder_layer(isa, packed.layer, &part, 1, 1);
}

// One part by the kernel itself, on scratch memory that is guarded and holds nothing but NaN.
void run_on_guarded_scratch(CpuIsa isa, const DecoderLayer& layer, const SequencePart& part) {
  const LayerChoice choice = choose_layer_kernel(isa, layer.arithmetic);
  const int64_t size = choice.scratch_size(layer, part.count, part.first + part.count);
  GuardedBuffer<float> scratch(size);
  std::fill_n(scratch.data(), size, kNan);
  choice.run(layer, &part, 1, scratch.data());
}

void test_against_the_twin(CpuIsa isa, LayerArithmetic arithmetic, const LayerSizes& sizes, int64_t longest) {
  const bool is_bfloat16 = arithmetic == LayerArithmetic::kBfloat16;
  const LayerWeights weights(sizes, longest, is_bfloat16, 1);
  const PackedLayer packed(isa, arithmetic, weights);
  Sequence whole(sizes, longest, is_bfloat16, 2);
  run_on_guarded_scratch(isa, packed.layer, whole.part(0, longest, true));
  const TwinStates twin =
      Twin(weights, is_bfloat16 ? rounded_to_bfloat16 : not_rounded).run(whole.in.at(0), longest);
  const auto check = [&](Rows& found, const std::vector<double>& expected) {
    const int64_t count = longest * found.columns;
    CHECK(static_cast<int64_t>(expected.size()) == count);
    check_close(found.at(0), expected.data(), longest, found.columns,
                is_bfloat16 ? kBfloat16Error : kFloat32Error);
    if (!is_bfloat16) return;
    check_close(found.at(0), expected.data(), 1, count, kBfloat16ErrorOfAll);
    for (int64_t i = 0; i < count; ++i)
      CHECK(rounded_to_bfloat16(double{found.values[i]}) == double{found.values[i]});
  };
  check(whole.qkv, twin.qkv);
  check(whole.kv, twin.kv);
  check(whole.attention, twin.attention);
  check(whole.mid, twin.mid);
  check(whole.gate_up, twin.gate_up);
  check(whole.out, twin.out);
  // The first positions do not know of the others, nor of what is kept.
  for (int64_t length : kLengths) {
    if (length > longest) break;
    Sequence first(sizes, length, is_bfloat16, 2);
    run(isa, packed, first.part(0, length));
    CHECK(same_bits(first.out, whole.out, 0, length));
    CHECK(same_bits(first.kv, whole.kv, 0, length));
  }
}

// Every row has the same bits whether its sequence is alone, or among others in calls that cut it anywhere,
// with any number of threads, and whether states are kept or outputs of earlier positions not wanted.
void test_cuts(CpuIsa isa, LayerArithmetic arithmetic, const LayerSizes& sizes, bool has_in, uint64_t seed) {
  const bool is_bfloat16 = arithmetic == LayerArithmetic::kBfloat16;
  const bool is_change = is_any_change(arithmetic);
  const LayerWeights base(sizes, kLongest, is_bfloat16, seed);
  LayerWeights weights = base;
  if (is_change) {
    for (float& each : weights.qkv.weight) each *= 1.125f;
    for (float& each : weights.mlp_out.weight) each *= 0.875f;
  }
  const PackedLayer exact(isa, LayerArithmetic::kFloat32, base);
  const PackedLayer packed(isa, arithmetic, weights, is_change ? &base : nullptr);
  std::deque<Sequence> bases, alone, cut;
  const auto part_of = [&](std::deque<Sequence>& of, size_t s, int64_t first, int64_t count, bool keeps) {
    return is_change ? of[s].change(bases[s], first, count, has_in) : of[s].part(first, count, keeps);
  };
  for (size_t s = 0; s < kSequences; ++s) {
    bases.emplace_back(sizes, kLengths[s], false, seed + 10 * s);
    alone.emplace_back(sizes, kLengths[s], is_bfloat16, seed + 10 * s + 1);
    cut.emplace_back(sizes, kLengths[s], is_bfloat16, seed + 10 * s + 1);
    if (is_change) run(isa, exact, bases[s].part(0, kLengths[s], true));
    run(isa, packed, part_of(alone, s, 0, kLengths[s], true));
  }
  Random random(seed);
  const auto first_output = [](size_t s) { return s % 3 == 1 ? kLengths[s] / 2 : 0; };
  const auto keeps = [](size_t s) { return s % 2 == 1; };
  int64_t done[kSequences] = {};
  for (bool is_done = false; !is_done;) {
    is_done = true;
    std::vector<SequencePart> parts;
    const size_t start = random.bits() % kSequences;
    for (size_t i = 0; i < kSequences; ++i) {
      const size_t s = (start + i) % kSequences;
      const int64_t most[] = {0, 1, 2, 14, 120};
      const int64_t count = std::min(kLengths[s] - done[s], random.integer(0, most[random.bits() % 5]));
      parts.push_back(part_of(cut, s, done[s], count, keeps(s)));
      parts.back().first_output = first_output(s);
      done[s] += count;
      is_done = is_done && done[s] == kLengths[s];
    }
    decoder_layer(isa, packed.layer, parts.data(), kSequences, 1 + static_cast<int>(random.bits() % 2));
  }
  for (size_t s = 0; s < kSequences; ++s) {
    const int64_t first = first_output(s), end = kLengths[s];
    CHECK(same_bits(cut[s].kv, alone[s].kv, 0, end));
    CHECK(same_bits(cut[s].out, alone[s].out, first, end));
    if (!keeps(s)) continue;
    CHECK(same_bits(cut[s].qkv, alone[s].qkv, first, end));
    CHECK(same_bits(cut[s].attention, alone[s].attention, first, end));
    CHECK(same_bits(cut[s].mid, alone[s].mid, first, end));
    CHECK(same_bits(cut[s].gate_up, alone[s].gate_up, first, end));
  }
}

// From states that are kept, a layer ends in the same bits wherever it starts; nothing else of them is read.
void test_starts(CpuIsa isa, LayerArithmetic arithmetic, const LayerSizes& sizes) {
  const bool is_bfloat16 = arithmetic == LayerArithmetic::kBfloat16;
  constexpr int64_t kLength = 110, kCut = 37;
  const LayerWeights weights(sizes, kLength, is_bfloat16, 3);
  PackedLayer packed(isa, arithmetic, weights);
  Sequence whole(sizes, kLength, is_bfloat16, 4);
  run(isa, packed, whole.part(0, kLength, true));
  for (LayerStart start : {LayerStart::kAttentionOut, LayerStart::kMlp, LayerStart::kMlpOut}) {
    packed.layer.start = start;
    Sequence again(sizes, kLength, is_bfloat16, 4);
    SequencePart parts[] = {again.part(0, kCut), again.part(kCut, kLength - kCut)};
    for (SequencePart& part : parts) {
      const LayerStates known = whole.states(part.first);
      part.kv = nullptr;
      if (start == LayerStart::kAttentionOut) {
        part.base.attention = known.attention;
        part.keep.mid = again.mid.at(part.first);
        part.keep.gate_up = again.gate_up.at(part.first);
      } else {
        part.in = nullptr;
        part.base.mid = known.mid;
        if (start == LayerStart::kMlpOut) part.base.gate_up = known.gate_up;
      }
    }
    decoder_layer(isa, packed.layer, parts, 2, 2);
    CHECK(same_bits(again.out, whole.out, 0, kLength));
    CHECK(start != LayerStart::kAttentionOut || same_bits(again.mid, whole.mid, 0, kLength));
    CHECK(start != LayerStart::kAttentionOut || same_bits(again.gate_up, whole.gate_up, 0, kLength));
  }
}

// Two layers against float32: of the first one weights change, the second one gets the difference, too.
void test_change(CpuIsa isa, LayerArithmetic arithmetic, const LayerSizes& sizes, int which,
                 bool in_last_rows) {
  constexpr int64_t kLength = 60;
  const auto sequence = [&](uint64_t seed) { return Sequence(sizes, kLength, false, seed); };
  const auto changed = [&](LayerWeights weights) {
    Linear* const linear[] = {&weights.qkv, &weights.attention_out, &weights.gate_up, &weights.mlp_out};
    std::vector<float>& matrix = linear[which]->weight;
    const auto third = static_cast<int64_t>(matrix.size() / 3);  // of separate projections, not all
    const auto change = [](float& each) { each = std::fabs(each) < 0.1f ? 0.0f : each * 1.0625f; };
    if (in_last_rows) std::for_each(matrix.end() - third, matrix.end(), change);
    if (!in_last_rows) std::for_each(matrix.begin(), matrix.begin() + third, change);
    return weights;
  };
  const auto difference = [&](Rows& to, Rows& a, Rows& b) {
    for (int64_t i = 0; i < kLength * to.columns; ++i) to.values[i] = a.values[i] - b.values[i];
  };
  const LayerWeights first(sizes, kLength, false, 5), second(sizes, kLength, false, 6);
  const LayerWeights new_first = changed(first), new_second = in_last_rows ? changed(second) : second;
  const auto exact = [&](const LayerWeights& weights, Sequence& of) {
    run(isa, PackedLayer(isa, LayerArithmetic::kFloat32, weights), of.part(0, kLength, true));
  };
  Sequence base = sequence(7), next_base = sequence(0), after = sequence(7), next_after = sequence(0);
  Sequence found = sequence(0), next = sequence(0), later = sequence(0), expected = sequence(0);
  exact(first, base);
  exact(new_first, after);
  std::copy_n(base.out.at(0), kLength * sizes.hidden, next_base.in.at(0));
  std::copy_n(after.out.at(0), kLength * sizes.hidden, next_after.in.at(0));
  exact(second, next_base);
  exact(new_second, next_after);

  const double error = arithmetic == LayerArithmetic::kChange ? kChangeError : kFineChangeError;
  PackedLayer layer(isa, arithmetic, new_first, &first);
  run(isa, layer, found.change(base, 0, kLength, false));
  difference(expected.out, after.out, base.out);
  check_close(found.out.at(0), expected.out.at(0), 1, kLength * sizes.hidden, error);
  const PackedLayer next_layer(isa, arithmetic, new_second, &second);
  difference(next.in, after.out, base.out);
  run(isa, next_layer, next.change(next_base, 0, kLength, true));
  difference(expected.out, next_after.out, next_base.out);
  check_close(next.out.at(0), expected.out.at(0), 1, kLength * sizes.hidden, error);

  // What comes before the first change is not computed, and gives the same.
  layer.layer.start = LayerStart(which);
  run(isa, layer, later.change(base, 0, kLength, false));
  for (int64_t i = 0; i < kLength * sizes.hidden; ++i) CHECK(later.out.values[i] == found.out.values[i]);
}

// Nothing changes: the difference is exactly zero, wherever the layer starts.
void test_no_change(CpuIsa isa, LayerArithmetic arithmetic, const LayerSizes& sizes) {
  constexpr int64_t kLength = 110;
  const LayerWeights weights(sizes, kLength, false, 8);
  const PackedLayer exact(isa, LayerArithmetic::kFloat32, weights);
  PackedLayer packed(isa, arithmetic, weights, &weights);
  Sequence base(sizes, kLength, false, 9), found(sizes, kLength, false, 10);
  run(isa, exact, base.part(0, kLength, true));
  for (LayerStart start :
       {LayerStart::kAttention, LayerStart::kAttentionOut, LayerStart::kMlp, LayerStart::kMlpOut}) {
    packed.layer.start = start;
    std::fill_n(found.out.at(0), kLength * sizes.hidden, kNan);
    run_on_guarded_scratch(isa, packed.layer, found.change(base, 0, kLength, false));
    for (int64_t i = 0; i < kLength * sizes.hidden; ++i) CHECK(found.out.values[i] == 0.0f);
  }
  std::fill_n(found.in.at(0), kLength * sizes.hidden, 0.0f);
  packed.layer.start = LayerStart::kAttention;
  run_on_guarded_scratch(isa, packed.layer, found.change(base, 0, kLength, true));
  for (int64_t i = 0; i < kLength * sizes.hidden; ++i) CHECK(found.out.values[i] == 0.0f);
}

// Position k of the input is the k-th unit vector: its queries, keys and values are column k of the matrix.
void test_packing(CpuIsa isa, LayerArithmetic arithmetic, LayerSizes sizes, int64_t hidden) {
  sizes.hidden = hidden;
  sizes.has_bias = false;
  LayerWeights weights(sizes, hidden, true, 11);
  Random random(12);
  for (float& each : weights.qkv.weight) each = static_cast<float>(random.integer(-127, 127));
  std::fill(weights.attention_norm.begin(), weights.attention_norm.end(), 1.0f);
  weights.eps = 0.0f;
  const PackedLayer packed(isa, arithmetic, weights);
  Sequence units(sizes, hidden, false, 0);
  std::fill_n(units.in.at(0), hidden * hidden, 0.0f);
  for (int64_t k = 0; k < hidden; ++k) units.in.at(k)[k] = 1.0f;
  run(isa, packed, units.part(0, hidden, true));
  const auto stored = [&](float value) {
    return arithmetic == LayerArithmetic::kFloat32 ? value
                                                   : static_cast<float>(rounded_to_bfloat16(double{value}));
  };
  const float normed = stored(1.0f / std::sqrt(1.0f / static_cast<float>(hidden)));
  for (int64_t k = 0; k < hidden; ++k) {
    for (int64_t n = 0; n < sizes.qkv_cols(); ++n) {
      CHECK(units.qkv.at(k)[n] == stored(weights.qkv.weight[static_cast<size_t>(n * hidden + k)] * normed));
    }
  }
}

void test_packed_size(CpuIsa isa, LayerArithmetic arithmetic) {
  for (int64_t N : {0, 1, 31, 32, 33, 70}) {
    for (int64_t K : {0, 1, 15, 16, 17, 32, 33, 600}) {
      const std::vector<float> matrix(static_cast<size_t>(N * K), 1.0f);
      const int64_t size = packed_matrix_size(arithmetic, N, K);
      GuardedBuffer<float> packed(size);
      std::fill_n(packed.data(), size, kNan);
      pack_matrix(isa, arithmetic, matrix.data(), N, K, packed.data(), 2);
      const bool pairs = arithmetic != LayerArithmetic::kFloat32;
      int64_t ones = 0;
      for (int64_t i = 0; i < size; ++i) {
        uint32_t bits;
        std::memcpy(&bits, packed.data() + i, sizeof bits);
        if (!pairs) CHECK(bits == 0 || packed[i] == 1.0f);
        if (pairs) CHECK((bits & 0xffffu) % 0x3f80u == 0 && (bits >> 16) % 0x3f80u == 0);
        ones += pairs ? (bits & 0xffffu) / 0x3f80u + (bits >> 16) / 0x3f80u : packed[i] == 1.0f;
      }
      CHECK(ones == N * K);  // and zeros everywhere else
    }
  }
}

// What is not finite at a position shows there and at all later ones, and at no earlier one.
void test_not_finite(CpuIsa isa, LayerArithmetic arithmetic, const LayerSizes& sizes, int64_t at, float bad) {
  const bool is_bfloat16 = arithmetic == LayerArithmetic::kBfloat16;
  const bool is_change = is_any_change(arithmetic);
  constexpr int64_t kLength = 45;
  const LayerWeights weights(sizes, kLength, is_bfloat16, 13);
  const PackedLayer exact(isa, LayerArithmetic::kFloat32, weights);
  const PackedLayer packed(isa, arithmetic, weights, is_change ? &weights : nullptr);
  Sequence base(sizes, kLength, false, 14), clean(sizes, kLength, is_bfloat16, 15);
  Sequence spoiled(sizes, kLength, is_bfloat16, 15), other(sizes, kLength, is_bfloat16, 15);
  spoiled.in.at(at)[sizes.hidden - 1] = bad;
  run(isa, exact, base.part(0, kLength, true));
  const auto part_of = [&](Sequence& of, int64_t first) {
    return is_change ? of.change(base, first, kLength - first, true) : of.part(first, kLength - first);
  };
  const auto are_nan = [&](Rows& rows, int64_t first) {
    return std::all_of(rows.at(first), rows.at(kLength), [](float each) { return std::isnan(each); });
  };
  const SequencePart parts[] = {part_of(spoiled, 0), part_of(other, 0)};
  run(isa, packed, part_of(clean, 0));
  decoder_layer(isa, packed.layer, parts, 2, 1);
  CHECK(same_bits(other.out, clean.out, 0, kLength));
  CHECK(same_bits(spoiled.out, clean.out, 0, at));
  CHECK(are_nan(spoiled.out, at));
  other.kv.at(at)[sizes.kv_cols()] = bad;  // the first value; the key is finite
  run(isa, packed, part_of(other, at + 1));
  CHECK(are_nan(other.out, at + 1));
}

// Scores that exp() of would overflow: all the weight goes to the largest one.
void test_large_scores(CpuIsa isa, LayerArithmetic arithmetic, const LayerSizes& sizes, float scale) {
  const bool is_bfloat16 = arithmetic == LayerArithmetic::kBfloat16;
  constexpr int64_t kLength = 45;
  LayerWeights weights(sizes, kLength, is_bfloat16, 16);
  weights.attention_scale = scale;
  const PackedLayer packed(isa, arithmetic, weights);
  Sequence sequence(sizes, kLength, is_bfloat16, 17);
  run(isa, packed, sequence.part(0, kLength, true));
  const TwinStates twin =
      Twin(weights, is_bfloat16 ? rounded_to_bfloat16 : not_rounded).run(sequence.in.at(0), kLength);
  check_close(sequence.attention.at(0), twin.attention.data(), kLength, sizes.q_cols(), 0x1p-8);
  for (int64_t i = 0; i < kLength * sizes.hidden; ++i) CHECK(std::isfinite(sequence.out.values[i]));
}

template <typename Call>
bool is_refused(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void test_which_arithmetic(CpuIsa isa) {
  for (LayerArithmetic arithmetic : kArithmetics) {
    if (has_layer_arithmetic(isa, arithmetic)) continue;
    DecoderLayer layer = {};
    layer.arithmetic = arithmetic;
    CHECK(is_refused([&] { decoder_layer(isa, layer, nullptr, 0, 1); }));
    CHECK(is_refused([&] { pack_matrix(isa, arithmetic, nullptr, 0, 0, nullptr, 1); }));
  }
}

void test_on_one_thread(CpuIsa isa, LayerArithmetic arithmetic) {
  const bool is_change = is_any_change(arithmetic);
  test_packed_size(isa, arithmetic);
  for (const LayerSizes& sizes : kSizes) {
    for (int64_t at : {0, 5, 33}) test_not_finite(isa, arithmetic, sizes, at, kNan);
    test_not_finite(isa, arithmetic, sizes, 33, kInfinity);
    if (is_change) {
      for (int which = 0; which < 8; ++which) test_change(isa, arithmetic, sizes, which / 2, which % 2 == 1);
      test_no_change(isa, arithmetic, sizes);
      continue;
    }
    test_against_the_twin(isa, arithmetic, sizes, kLongest);
    for (int64_t hidden : {1, 20, 33, 48}) test_packing(isa, arithmetic, sizes, hidden);
    for (float scale : {1e30f, -1e30f}) test_large_scores(isa, arithmetic, sizes, scale);
  }
  if (is_change) {
    for (int which = 0; which < 4; ++which) test_change(isa, arithmetic, kWide, which, which % 2 == 1);
  } else {
    test_against_the_twin(isa, arithmetic, kWide, 33);
    test_packing(isa, arithmetic, kSizes[1], kWide.hidden);
  }
}

}  // namespace

int main() {
  const struct {
    CpuIsa isa;
    bool float32, pairs, tiles;
  } table[] = {{CpuIsa::kNone, false, false, false},     {CpuIsa::kAvx2, false, false, false},
               {CpuIsa::kAvx512, true, false, false},    {CpuIsa::kAvx512Vnni, true, false, false},
               {CpuIsa::kAvx512Bf16, true, true, false}, {CpuIsa::kAmx, true, true, true}};
  for (const auto& row : table) {
    CHECK(has_layer_arithmetic(row.isa, LayerArithmetic::kFloat32) == row.float32);
    CHECK(has_layer_arithmetic(row.isa, LayerArithmetic::kChange) == row.pairs);
    CHECK(has_layer_arithmetic(row.isa, LayerArithmetic::kBfloat16) == row.pairs);
    CHECK(has_layer_arithmetic(row.isa, LayerArithmetic::kFineChange) == row.tiles);
  }
  for_each_isa([](CpuIsa isa) {
    test_which_arithmetic(isa);
    for (LayerArithmetic arithmetic : kArithmetics) {
      if (!has_layer_arithmetic(isa, arithmetic)) continue;
      if (arithmetic == LayerArithmetic::kFloat32 && isa != CpuIsa::kAvx512) {
        test_starts(isa, arithmetic, kSizes[2]);  // the same kernel as on AVX-512
        continue;
      }
      const bool is_change = is_any_change(arithmetic);
      uint64_t seed = 100;
      for (const LayerSizes& sizes : kSizes) {
        test_cuts(isa, arithmetic, sizes, true, ++seed);
        if (is_change) test_cuts(isa, arithmetic, sizes, false, ++seed);
        if (!is_change) test_starts(isa, arithmetic, sizes);
      }
      if (!kThreadsOnly) test_on_one_thread(isa, arithmetic);
    }
  });
}
