#include "certificate_threats.h"

#include <algorithm>
#include <cmath>

#include "parallel_for.h"
#include "store_float.h"

namespace dtm_fast {
namespace {

constexpr int64_t kRowsPerTask = 32;
constexpr int64_t kSums = 16;  // so many at once, for the compiler to make vectors of them

float widened(float value) { return value; }
float widened(uint16_t bits) { return float_from_bfloat16(bits); }

template <typename T>
double squared_distance(const T* a, const T* b, int64_t D) {
  double sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= D; k += kSums) {
    for (int64_t i = 0; i < kSums; ++i) {
      const double difference = static_cast<double>(widened(a[k + i])) - widened(b[k + i]);
      sums[i] += difference * difference;
    }
  }
  double sum = 0.0;
  for (; k < D; ++k) {
    const double difference = static_cast<double>(widened(a[k])) - widened(b[k]);
    sum += difference * difference;
  }
  for (double each : sums) sum += each;
  return sum;
}

template <typename T>
void count_threats(const CertificateThreats& args, int num_threads) {
  const T* hidden = static_cast<const T*>(args.hidden);
  const T* base = static_cast<const T*>(args.base);
  parallel_for((args.P + kRowsPerTask - 1) / kRowsPerTask, num_threads, [&](int64_t task, int) {
    const int64_t end = std::min(args.P, (task + 1) * kRowsPerTask);
    for (int64_t p = task * kRowsPerTask; p < end; ++p) {
      const double square = squared_distance(hidden + p * args.hidden_stride, base + p * args.D, args.D);
      const float distance = static_cast<float>(std::sqrt(square)) * args.enlarged + args.added;
      const float* radius = args.radius + p * args.R;
      int64_t proved = 0;
      for (int64_t r = 0; r < args.R; ++r) proved += distance < radius[r] ? 1 : 0;
      args.threats[p] = args.R - proved;
    }
  });
}

}  // namespace

void certificate_threats(const CertificateThreats& args, int num_threads) {
  args.type == FloatType::kFloat32 ? count_threats<float>(args, num_threads)
                                   : count_threats<uint16_t>(args, num_threads);
}

}  // namespace dtm_fast
