// exp over its whole range: below 2 ulp, zero below 2^-126, the same bits from every instruction set.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "check.h"
#include "exp_check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

int main() {
  std::vector<float> x = {0.0f,      -0.0f,  -1e-45f, -87.33654f,
                          -87.3366f, -88.0f, -1e38f,  -std::numeric_limits<float>::infinity()};
  for (float each = 0.0f; each > -90.0f; each -= 0.0007f) x.push_back(each);
  x.resize((x.size() + 15) / 16 * 16, -1.0f);
  std::vector<float> first;
  for_each_isa([&](CpuIsa isa) {
    std::vector<float> result(x.size());
    const auto exp = isa == CpuIsa::kAvx2 ? exp_avx2 : exp_avx512;
    exp(x.data(), static_cast<int64_t>(x.size()), result.data());
    double worst = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double truth = std::exp(static_cast<double>(x[i]));
      if (x[i] < -87.33655f) {
        CHECK(result[i] == 0.0f);
      } else {
        const float near = static_cast<float>(truth);
        const double ulp = static_cast<double>(std::nextafter(near, 2.0f)) - near;
        worst = std::max(worst, std::fabs(result[i] - truth) / ulp);
      }
    }
    std::printf("isa %d: worst error %.3f ulp\n", static_cast<int>(isa), worst);
    CHECK(worst < 2.0);
    if (first.empty()) first = result;
    CHECK(result == first);
  });
}
