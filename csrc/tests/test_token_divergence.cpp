#include <cmath>
#include <cstring>
#include <limits>

#include "../kernels/cpu/masked_linear.h"
#include "../kernels/cpu/row_marks.h"
#include "../kernels/cpu/store_float.h"
#include "../kernels/cpu/token_divergence.h"
#include "check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

void store_float(void* array, FloatType type, int64_t index, float value) {
  store_floats(array, type, index, &value, 1);
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Small integers, so that every sum is exact and many logits tie.
void test_shape(CpuIsa isa, FloatType type, int64_t T, int64_t V, int64_t D) {
  Random random(static_cast<uint64_t>((T * 10000 + V) * 1000 + D));
  const int64_t hidden_stride = D + 1, head_stride = D + 3;
  const int64_t hidden_size = T == 0 ? 0 : (T - 1) * hidden_stride + D, head_size = (V - 1) * head_stride + D;
  std::vector<float> hidden(static_cast<size_t>(hidden_size)), head(static_cast<size_t>(head_size));
  for (float& each : hidden) each = static_cast<float>(random.integer(-3, 3));
  for (float& each : head) each = static_cast<float>(random.integer(-3, 3));
  const bool narrow = type == FloatType::kBfloat16;
  GuardedBuffer<float> hidden32(narrow ? 0 : hidden_size), head32(narrow ? 0 : head_size);
  GuardedBuffer<uint16_t> hidden16(narrow ? hidden_size : 0), head16(narrow ? head_size : 0);
  void* hidden_data = narrow ? static_cast<void*>(hidden16.data()) : hidden32.data();
  void* head_data = narrow ? static_cast<void*>(head16.data()) : head32.data();
  for (int64_t i = 0; i < hidden_size; ++i) store_float(hidden_data, type, i, hidden[static_cast<size_t>(i)]);
  for (int64_t i = 0; i < head_size; ++i) store_float(head_data, type, i, head[static_cast<size_t>(i)]);
  GuardedBuffer<int64_t> reference(T);
  for (int64_t t = 0; t < T; ++t) reference[t] = random.integer(0, V - 1);
  GuardedBuffer<uint8_t> mismatch(T);
  GuardedBuffer<float> nll(T);
  const TokenDivergence args = {
      type, hidden_data, hidden_stride,   head_data, head_stride, reference.data(), T,
      V,    D,           mismatch.data(), nll.data()};
  token_divergence(isa, args, 2);
  std::vector<double> logits(static_cast<size_t>(V));
  for (int64_t t = 0; t < T; ++t) {
    int64_t best = 0;
    for (int64_t v = 0; v < V; ++v) {
      double sum = 0.0;
      for (int64_t d = 0; d < D; ++d) {
        sum += hidden[static_cast<size_t>(t * hidden_stride + d)] *
               head[static_cast<size_t>(v * head_stride + d)];
      }
      const float rounded = static_cast<float>(sum);
      logits[static_cast<size_t>(v)] = narrow ? float_from_bfloat16(bfloat16_bits(rounded)) : rounded;
      if (logits[static_cast<size_t>(v)] > logits[static_cast<size_t>(best)]) best = v;
    }
    double sum = 0.0;
    for (double logit : logits) sum += std::exp(logit - logits[static_cast<size_t>(best)]);
    const double expected =
        logits[static_cast<size_t>(best)] + std::log(sum) - logits[static_cast<size_t>(reference[t])];
    CHECK(mismatch[t] == (best != reference[t]));
    CHECK(std::fabs(nll[t] - expected) <= 1e-6 * (1.0 + expected));
  }
}

// Few families of tokens that hardly differ, so that the last bits of the logits decide: they must be those
// of masked_linear, which has the same order of sums and a scalar twin of it. Some rows cannot be multiplied
// in pieces.
void test_near_ties(CpuIsa isa, FloatType type, int64_t T, int64_t V, int64_t D) {
  Random random(static_cast<uint64_t>(T * V + D));
  constexpr int64_t kFamilies = 7;
  const bool narrow = type == FloatType::kBfloat16;
  const int64_t bytes = narrow ? 2 : 4;
  GuardedBuffer<char> hidden(T * D * bytes), head(V * D * bytes);
  std::vector<float> families(static_cast<size_t>(kFamilies * D));
  for (float& each : families) each = random.uniform();
  for (int64_t v = 0; v < V; ++v) {
    for (int64_t d = 0; d < D; ++d) {
      const float noise = random.uniform() * (narrow ? 0x1p-9f : 0x1p-24f);
      store_float(head.data(), type, v * D + d,
                  families[static_cast<size_t>(v % kFamilies * D + d)] * (1.0f + noise));
    }
  }
  for (int64_t t = 0; t < T; ++t) {
    const float scale = t % 19 == 3 ? kSmallRow / 4 : 1.0f;
    for (int64_t d = 0; d < D; ++d) store_float(hidden.data(), type, t * D + d, random.uniform() * scale);
    // Too large for a piece, so that all logits of the row are, but they are finite.
    if (!narrow && t % 19 == 7) store_float(hidden.data(), type, t * D, 0x1.fffffep127f);
  }
  const int64_t mask_bytes = (D + 7) / 8;
  const std::vector<uint8_t> mask(static_cast<size_t>(mask_bytes), 0xff);
  std::vector<char> product(static_cast<size_t>(T * V * bytes));
  MaskedLinear linear = {};
  linear.type = type;
  linear.x = hidden.data();
  linear.x_stride = D;
  linear.weight = head.data();
  linear.weight_stride = D;
  linear.mask = mask.data();
  linear.V = 1;
  linear.M = T;
  linear.N = V;
  linear.K = D;
  linear.y = product.data();
  masked_linear(isa, linear, 2);
  std::vector<int64_t> winner(static_cast<size_t>(T)), other(static_cast<size_t>(T));
  std::vector<double> expected(static_cast<size_t>(T));
  for (int64_t t = 0; t < T; ++t) {
    std::vector<float> logits(static_cast<size_t>(V));
    for (int64_t v = 0; v < V; ++v) {
      const int64_t at = t * V + v;
      logits[static_cast<size_t>(v)] =
          narrow ? float_from_bfloat16(reinterpret_cast<const uint16_t*>(product.data())[at])
                 : reinterpret_cast<const float*>(product.data())[at];
    }
    int64_t best = 0;
    for (int64_t v = 0; v < V; ++v) {
      const float logit = logits[static_cast<size_t>(v)];
      if (std::isnan(logits[static_cast<size_t>(best)])) break;
      if (std::isnan(logit) || logit > logits[static_cast<size_t>(best)]) best = v;
    }
    const float largest = logits[static_cast<size_t>(best)];
    double sum = 0.0;
    for (float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
    winner[static_cast<size_t>(t)] = best;
    other[static_cast<size_t>(t)] = (best + kFamilies) % V;  // of the same family, unless at the end
    expected[static_cast<size_t>(t)] =
        std::log(sum) + largest - logits[static_cast<size_t>(other[static_cast<size_t>(t)])];
  }
  GuardedBuffer<uint8_t> mismatch(T);
  GuardedBuffer<float> nll(T);
  token_divergence(
      isa, {type, hidden.data(), D, head.data(), D, winner.data(), T, V, D, mismatch.data(), nll.data()}, 2);
  for (int64_t t = 0; t < T; ++t) CHECK(mismatch[t] == 0);
  token_divergence(
      isa, {type, hidden.data(), D, head.data(), D, other.data(), T, V, D, mismatch.data(), nll.data()}, 2);
  for (int64_t t = 0; t < T; ++t) {
    const double want = expected[static_cast<size_t>(t)];
    CHECK(mismatch[t] == 1);
    CHECK(std::isfinite(want) ? std::fabs(nll[t] - want) <= 2e-6 * (1.0 + std::fabs(want))
                              : !std::isfinite(nll[t]));
  }
}

// One token whose logits are the given numbers, through D = 1 and hidden = 1.
void test_logits(CpuIsa isa, FloatType type, const std::vector<float>& logits, int64_t argmax,
                 float expected_nll) {
  const int64_t count = static_cast<int64_t>(logits.size());
  std::vector<float> head(logits.size());
  float hidden;
  store_float(&hidden, type, 0, 1.0f);
  for (int64_t i = 0; i < count; ++i) store_float(head.data(), type, i, logits[static_cast<size_t>(i)]);
  uint8_t mismatch = 2;
  float nll = 0.0f;
  token_divergence(isa, {type, &hidden, 1, head.data(), 1, &argmax, 1, count, 1, &mismatch, &nll}, 1);
  CHECK(mismatch == 0);
  CHECK(std::isnan(expected_nll) ? std::isnan(nll) : std::fabs(nll - expected_nll) < 1e-6f);
  for (int64_t other : {argmax - 1, argmax + 1, count - 1}) {
    if (other < 0 || other >= count || other == argmax) continue;
    token_divergence(isa, {type, &hidden, 1, head.data(), 1, &other, 1, count, 1, &mismatch, &nll}, 1);
    CHECK(mismatch == 1);
  }
}

// Every upper half of a float32, with lower halves around and at the middle.
void test_rounding(CpuIsa isa) {
  RoundLogits* const round = isa >= CpuIsa::kAvx512 ? round_logits_avx512 : round_logits_avx2;
  constexpr int64_t kCount = 1 << 16;
  GuardedBuffer<float> logits(kCount);
  for (uint32_t lower : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
    const auto logit = [&](int64_t i) {
      const uint32_t bits = static_cast<uint32_t>(i) << 16 | lower;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    };
    for (int64_t i = 0; i < kCount; ++i) logits[i] = logit(i);
    round(logits.data(), kCount);
    for (int64_t i = 0; i < kCount; ++i) {
      const float expected = float_from_bfloat16(bfloat16_bits(logit(i)));
      CHECK(std::memcmp(&logits[i], &expected, sizeof expected) == 0);
    }
  }
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    test_rounding(isa);
    for (FloatType type : {FloatType::kFloat32, FloatType::kBfloat16}) {
      for (int64_t V : {1, 15, 16, 17, 255, 256, 257, 600}) {
        for (int64_t D : {0, 1, 17, 64}) {
          for (int64_t T : {0, 1, 5, 13}) test_shape(isa, type, T, V, D);
        }
      }
      test_shape(isa, type, 245, 40, 9);
      test_shape(isa, type, 1000, 300, 5);
      test_shape(isa, type, 530, 1100, 33);
      test_shape(isa, type, 20, 1300, 700);
      test_shape(isa, type, 2070, 40, 3);
    }
    for (FloatType type : {FloatType::kFloat32, FloatType::kBfloat16}) {
      for (int64_t D : {20, 130, 1024, 1061, 2340}) test_near_ties(isa, type, 45, 300, D);
      test_near_ties(isa, type, 1, 1300, 70);
      test_near_ties(isa, type, 1100, 40, 70);
    }
    for (FloatType type : {FloatType::kFloat32, FloatType::kBfloat16}) {
      test_logits(isa, type, {1.0f, 1.0f}, 0, std::log(2.0f));
      test_logits(isa, type, {1.0f, kNan, kInfinity, kNan}, 1, kNan);
      test_logits(isa, type, {-kInfinity, -kInfinity}, 0, kNan);
      test_logits(isa, type, {-kInfinity, 3.0f, -1e30f}, 1, 0.0f);
      test_logits(isa, type, {3.0f, kInfinity, kInfinity}, 1, kNan);
      test_logits(isa, type, {-3e38f, 3e38f, -kInfinity, 3e38f}, 1, 0.0f);  // 3e38 + log 2 - 3e38
      std::vector<float> many(2700, -kInfinity);
      many[600] = many[650] = 5.0f;
      test_logits(isa, type, many, 600, std::log(2.0f));
      many[2600] = 6.0f;
      test_logits(isa, type, many, 2600, std::log(1.0f + 2.0f * std::exp(-1.0f)));
      many[300] = many[690] = kNan;
      test_logits(isa, type, many, 300, kNan);
    }
  });
}
