// By how much a gated product changes, from gates of any size and changes of any size.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "gated_change_check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
  float gate, up, gate_change, up_change;
};

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// Each of 16 lanes is another case; the number of cases is filled up with the last one.
std::vector<float> changes(std::vector<Case> cases) {
  const size_t count = cases.size();
  cases.resize((count + 15) / 16 * 16, cases.back());
  std::vector<float> columns[4], out(cases.size());
  for (const Case& each : cases) {
    columns[0].push_back(each.gate), columns[1].push_back(each.up);
    columns[2].push_back(each.gate_change), columns[3].push_back(each.up_change);
  }
  gated_change_avx512(columns[0].data(), columns[1].data(), columns[2].data(), columns[3].data(),
                      static_cast<int64_t>(cases.size()), out.data());
  out.resize(count);
  return out;
}

// Sixteen times each case: one that changes much sends its whole vector another way.
void check_alone_and_together(const std::vector<Case>& cases) {
  const std::vector<float> together = changes(cases);
  std::vector<Case> apart;
  for (const Case& each : cases) apart.insert(apart.end(), 16, each);
  const std::vector<float> alone = changes(apart);
  for (size_t i = 0; i < cases.size(); ++i) {
    const double g = double{cases[i].gate}, u = double{cases[i].up};
    const double new_g = g + double{cases[i].gate_change}, new_u = u + double{cases[i].up_change};
    const double truth = new_g * sigmoid(new_g) * new_u - g * sigmoid(g) * u;
    // The terms that are added, and what float32, and double here, loses where two products are subtracted.
    const double linear = sigmoid(g) * (std::fabs(double{cases[i].gate_change} * new_u) +
                                        std::fabs(g * double{cases[i].up_change}));
    const double fall = (sigmoid(g) - sigmoid(new_g)) * new_g * new_u;
    const double products = std::fabs(new_g * sigmoid(new_g) * new_u) + std::fabs(g * sigmoid(g) * u);
    const bool is_far = std::fabs(cases[i].gate_change) > 0.5f;
    // No sigmoid is computed below 2^-60.
    const double tiny = 0x1p-59 * (std::fabs(g) + std::fabs(new_g)) * (std::fabs(u) + std::fabs(new_u));
    const double smooth = 0x1p-11 * (linear + std::fabs(fall)) + 0x1p-50 * products + tiny;
    // A new gate is rounded, too, by 2^-24 of it, and so is its exponential.
    const double subtracted = 0x1p-22 * (3.0 + std::fabs(new_g)) * products + 1e-35;
    for (size_t lane = 0; lane < 16; ++lane) {
      const double error = std::fabs(double{alone[16 * i + lane]} - truth);
      CHECK(error <= (is_far ? subtracted : smooth));
    }
    CHECK(std::fabs(double{together[i]} - truth) <= smooth + subtracted);
    const bool changes_nothing = cases[i].gate_change == 0.0f && cases[i].up_change == 0.0f;
    CHECK(!changes_nothing || (alone[16 * i] == 0.0f && together[i] == 0.0f));
  }
}

}  // namespace

int main() {
  if (detected_cpu_isa() < CpuIsa::kAvx512) return 0;
  std::vector<Case> cases;
  const std::vector<float> gates = {-200.0f, -89.0f, -60.0f, -42.0f, -41.0f, -12.5f, -1.0f, -0.01f,
                                    0.0f,    0.3f,   2.0f,   7.75f,  30.0f,  61.0f,  89.0f, 200.0f};
  for (float gate : gates) {
    for (float up : {-50.0f, -0.7f, 0.0f, 1.0f, 3.0f}) {
      for (float size : {0.0f, 1e-6f, 1e-3f, 0.1f, 0.5f, 0.51f, 3.0f, 150.0f}) {
        for (float up_change : {0.0f, -1e-5f, 0.01f, 2.0f}) {
          cases.push_back({gate, up, size, up_change});
          cases.push_back({gate, up, -size, up_change});
        }
      }
    }
  }
  check_alone_and_together(cases);
  Random random(1);
  cases.clear();
  for (int i = 0; i < 100000; ++i) {
    const float size = std::exp2(-20.0f * (1.0f + random.uniform()) + 6.0f);
    cases.push_back({20.0f * random.uniform(), 5.0f * random.uniform(), size * random.uniform(),
                     size * random.uniform()});
  }
  check_alone_and_together(cases);
  for (float bad : {kNan, kInfinity, -kInfinity}) {
    const std::vector<float> found = changes({{1.0f, 1.0f, bad, 0.0f}, {1.0f, 1.0f, 0.1f, bad}});
    CHECK(!std::isfinite(found[1]));
    CHECK(bad == -kInfinity ? std::isnan(found[0]) || found[0] <= 0.0f : !std::isfinite(found[0]));
  }
}
