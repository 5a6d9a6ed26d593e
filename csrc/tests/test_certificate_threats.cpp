// certificate_threats on every instruction set, and select_threatened, against plain loops.
#include <cmath>
#include <limits>
#include <set>

#include "../kernels/cpu/certificate_threats.h"
#include "../kernels/cpu/select_threatened.h"
#include "../kernels/cpu/store_float.h"
#include "check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

constexpr float kEnlarged = 1.0f + 0x1p-16f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <typename T>
struct Element;
template <>
struct Element<float> {
  static constexpr FloatType kType = FloatType::kFloat32;
  static float of(float x) { return x; }
  static double value(float x) { return x; }
};
template <>
struct Element<uint16_t> {
  static constexpr FloatType kType = FloatType::kBfloat16;
  static uint16_t of(float x) { return bfloat16_bits(x); }
  static double value(uint16_t x) { return float_from_bfloat16(x); }
};

// Radii that are well below and well above the bound, NaN and infinity among them.
template <typename T>
void test_threats(CpuIsa isa, int64_t P, int64_t D, int64_t R) {
  Random random(static_cast<uint64_t>(P * 1000 + D));
  const int64_t stride = D + 3;
  const float added = static_cast<float>(D + 1) * 0x1p-100f;
  GuardedBuffer<T> hidden(P == 0 ? 0 : (P - 1) * stride + D), base(P * D);
  GuardedBuffer<float> radius(P * R);
  GuardedBuffer<int64_t> threats(P);
  std::vector<int64_t> expected;
  for (int64_t p = 0; p < P; ++p) {
    double square = 0.0;
    for (int64_t d = 0; d < D; ++d) {
      base[p * D + d] = Element<T>::of(random.uniform());
      hidden[p * stride + d] = Element<T>::of(p % 5 == 2 && d == D / 2 ? kInfinity : random.uniform());
      const double difference =
          Element<T>::value(hidden[p * stride + d]) - Element<T>::value(base[p * D + d]);
      square += difference * difference;
    }
    const double bound = std::sqrt(square) * kEnlarged + added;
    expected.push_back(0);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t kind = random.integer(0, 3);
      const double factor = kind == 0 ? 1.0 - 0x1p-20 : 1.0 + 0x1p-20;
      radius[p * R + r] = kind == 3 ? kNan : kind == 2 ? kInfinity : static_cast<float>(bound * factor);
      const bool proved = std::isfinite(bound) && (kind == 1 || kind == 2);
      if (!proved) ++expected.back();
    }
  }
  const CertificateThreats args = {
      Element<T>::kType, hidden.data(), stride,        base.data(), radius.data(), P, D, R,
      kEnlarged,         added,         threats.data()};
  certificate_threats(isa, args, 2);
  for (int64_t p = 0; p < P; ++p) CHECK(threats[p] == expected[static_cast<size_t>(p)]);
}

void test_selection(int64_t P, int64_t K, int64_t V) {
  Random random(static_cast<uint64_t>(P + K + V));
  GuardedBuffer<int64_t> threats(P), top(P), nearest(P * K), reference(P), positions(P), tokens(V), own(P);
  const int64_t last = V - 1;
  for (int64_t p = 0; p < P; ++p) {
    threats[p] = random.integer(0, K + 1);
    top[p] = random.integer(0, last);
    reference[p] = random.integer(0, last);
    for (int64_t i = 0; i < K; ++i) nearest[p * K + i] = random.integer(0, last);
  }
  const int64_t least = K / 3;
  const SelectedCounts found =
      select_threatened({threats.data(), top.data(), nearest.data(), reference.data(), P, K, V, least, K,
                         positions.data(), tokens.data(), own.data()});
  std::set<int64_t> wanted;
  int64_t count = 0;
  for (int64_t p = 0; p < P; ++p) {
    if (threats[p] < least || threats[p] > K) continue;
    CHECK(positions[count] == p);
    CHECK(tokens[own[count]] == reference[p]);
    ++count;
    wanted.insert(top[p]);
    wanted.insert(reference[p]);
    for (int64_t i = 0; i < threats[p]; ++i) wanted.insert(nearest[p * K + i]);
  }
  CHECK(found.positions == count);
  CHECK(std::vector<int64_t>(tokens.data(), tokens.data() + found.tokens) ==
        std::vector<int64_t>(wanted.begin(), wanted.end()));
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    for (int64_t D : {0, 1, 7, 16, 17, 33, 100, 576}) {
      for (int64_t R : {0, 1, 8, 15, 16, 17, 129}) {
        for (int64_t P : {0, 1, 40}) {
          test_threats<float>(isa, P, D, R);
          test_threats<uint16_t>(isa, P, D, R);
        }
      }
    }
  });
  for (int64_t V : {1, 7, 8, 9, 1000}) {
    for (int64_t K : {0, 1, 16}) {
      for (int64_t P : {0, 1, 50}) test_selection(P, K, V);
    }
  }
}
