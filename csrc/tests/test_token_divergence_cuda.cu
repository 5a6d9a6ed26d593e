// token_divergence on a GPU: every kernel that can take the arguments, against double precision on the CPU.
// benchmarks/cuda/on_device.sh builds and runs it, also under compute-sanitizer.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../kernels/cuda/token_divergence.h"
#include "cuda_check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Found {
  std::vector<uint8_t> mismatch;
  std::vector<float> nll;
};

// hidden and lm_head as they lie in memory, and what they should give.
template <typename T>
class Case {
 public:
  int64_t T_, V_, D_, hidden_stride_, head_stride_, offset_;
  std::vector<T> hidden_, head_;
  std::vector<int64_t> reference_;

  Case(int64_t tokens, int64_t vocabulary, int64_t depth, int64_t hidden_stride, int64_t head_stride,
       int64_t offset)
      : T_(tokens),
        V_(vocabulary),
        D_(depth),
        hidden_stride_(hidden_stride),
        head_stride_(head_stride),
        offset_(offset),
        hidden_(size(tokens, hidden_stride), from_float<T>(kNan)),
        head_(size(vocabulary, head_stride), from_float<T>(kNan)),
        reference_(static_cast<size_t>(tokens)) {}

  T& hidden(int64_t t, int64_t d) { return hidden_[static_cast<size_t>(t * hidden_stride_ + d)]; }
  T& head(int64_t v, int64_t d) { return head_[static_cast<size_t>(v * head_stride_ + d)]; }

  // Small integers, so that every sum is exact and many logits tie, or floats.
  void fill(bool integers, Random& random) {
    const auto number = [&] {
      return from_float<T>(integers ? static_cast<float>(random.integer(-3, 3)) : random.uniform());
    };
    for (int64_t t = 0; t < T_; ++t)
      for (int64_t d = 0; d < D_; ++d) hidden(t, d) = number();
    for (int64_t v = 0; v < V_; ++v)
      for (int64_t d = 0; d < D_; ++d) head(v, d) = number();
    for (int64_t& each : reference_) each = random.integer(0, V_ - 1);
  }

  // The logits of a row, as double but for the rounding to T.
  std::vector<double> logits(int64_t t) const {
    std::vector<double> found(static_cast<size_t>(V_));
    for (int64_t v = 0; v < V_; ++v) {
      double sum = 0.0;
      for (int64_t d = 0; d < D_; ++d)
        sum += static_cast<double>(to_float(hidden_[static_cast<size_t>(t * hidden_stride_ + d)])) *
               to_float(head_[static_cast<size_t>(v * head_stride_ + d)]);
      found[static_cast<size_t>(v)] = sum;
    }
    return found;
  }

  // The first `rows` tokens.
  Found run(CudaKernel kernel, int64_t rows, bool* possible) const {
    const int64_t tiles = (V_ + kSmallestVocabularyTile - 1) / kSmallestVocabularyTile;
    const DeviceBuffer<T> hidden(hidden_, offset_), head(head_, offset_);
    const DeviceBuffer<int64_t> reference(reference_);
    DeviceBuffer<uint8_t> mismatch(rows);
    DeviceBuffer<float> nll(rows), own_logit(rows);
    DeviceBuffer<LogitSummary> summaries(tiles * rows);
    const TokenDivergence args = {float_type<T>(),
                                  hidden.data(),
                                  hidden_stride_,
                                  head.data(),
                                  head_stride_,
                                  reference.data(),
                                  rows,
                                  V_,
                                  D_,
                                  mismatch.data(),
                                  nll.data(),
                                  summaries.data(),
                                  own_logit.data()};
    *possible = token_divergence_possible(kernel, args);
    if (!*possible) return {};
    const Stream stream;
    token_divergence_cuda(kernel, args, stream);
    return {mismatch.host(), nll.host()};
  }

  // Calls check(kernel, found) for the kernels that can take the arguments.
  template <typename Check>
  void for_each_kernel(const Check& check) const {
    for (int kernel = 0; kernel < kCudaKernels; ++kernel) {
      bool possible = false;
      const Found found = run(CudaKernel(kernel), T_, &possible);
      const bool always = CudaKernel(kernel) == CudaKernel::kBest || CudaKernel(kernel) == CudaKernel::kMma;
      if (always && !possible) expect(false, "kernel %d is not possible", kernel);
      if (possible) check(kernel, found);
    }
  }

 private:
  size_t size(int64_t rows, int64_t stride) const {
    return static_cast<size_t>(rows == 0 ? 0 : (rows - 1) * stride + D_);
  }
};

double rounded(double logit, size_t bytes) {
  return bytes == 2 ? float_from_bfloat16(bfloat16_bits(static_cast<float>(logit)))
                    : static_cast<float>(logit);
}

double log_sum_exp(const std::vector<double>& logits, double largest) {
  double sum = 0.0;
  for (double logit : logits) sum += std::exp(logit - largest);
  return largest + std::log(sum);
}

template <typename T>
void check_sums(const Case<T>& each, bool integers) {
  if (left_out()) return;
  std::vector<std::vector<double>> logits;
  for (int64_t t = 0; t < each.T_; ++t) logits.push_back(each.logits(t));
  each.for_each_kernel([&](int kernel, const Found& found) {
    int64_t wrong = 0;
    for (int64_t t = 0; t < each.T_; ++t) {
      std::vector<double> row = logits[static_cast<size_t>(t)];
      double largest_sum = 0.0;  // of |hidden|, times the largest |lm_head| of 1
      for (int64_t d = 0; d < each.D_; ++d)
        largest_sum += std::fabs(to_float(each.hidden_[static_cast<size_t>(t * each.hidden_stride_ + d)]));
      if (integers)
        for (double& logit : row) logit = rounded(logit, sizeof(T));
      const auto best = std::max_element(row.begin(), row.end());  // the first of equals
      const auto reference = static_cast<size_t>(each.reference_[static_cast<size_t>(t)]);
      const bool expected = static_cast<size_t>(best - row.begin()) != reference;
      const double nll = log_sum_exp(row, *best) - row[reference];
      // Errors of a logit: of its sum in float32, and of its rounding.
      const double error = integers ? 0.0
                                    : 2.0 * static_cast<double>(each.D_ + 2) * 0x1p-24 * largest_sum +
                                          std::fabs(*best) * (sizeof(T) == 2 ? 0x1p-8 : 0x1p-24);
      const double own_error =
          integers ? 0.0 : std::fabs(row[reference]) * (sizeof(T) == 2 ? 0x1p-8 : 0x1p-24);
      double lowest = *best;
      for (double logit : row) lowest = std::min(lowest, logit);
      const double rounding_of_all = integers || sizeof(T) == 4 ? 0.0 : std::fabs(lowest) * 0x1p-8;
      const double bound = 2.0 * error + own_error + rounding_of_all + 2e-6 * (1.0 + std::fabs(nll));
      // Which of two logits that all but tie is larger, only exact sums tell.
      double second = -kInfinity;
      for (size_t v = 0; v < row.size(); ++v)
        if (static_cast<size_t>(best - row.begin()) != v) second = std::max(second, row[v]);
      const bool decided = integers || *best - second > 2.0 * error;
      const bool right = (!decided || (found.mismatch[static_cast<size_t>(t)] == 1) == expected) &&
                         found.mismatch[static_cast<size_t>(t)] <= 1 &&
                         std::fabs(found.nll[static_cast<size_t>(t)] - nll) <= bound;
      if (!right && wrong++ == 0)
        expect(false, "kernel %d, token %lld: mismatch %d, not %d; nll %.9g, not %.9g", kernel,
               static_cast<long long>(t), found.mismatch[static_cast<size_t>(t)], expected,
               static_cast<double>(found.nll[static_cast<size_t>(t)]), nll);
    }
    expect(wrong == 0, "kernel %d, %d bytes, T %lld, V %lld, D %lld, offset %lld: %lld wrong", kernel,
           static_cast<int>(sizeof(T)), static_cast<long long>(each.T_), static_cast<long long>(each.V_),
           static_cast<long long>(each.D_), static_cast<long long>(each.offset_),
           static_cast<long long>(wrong));
  });
}

// Tokens whose logits are given numbers, through D = 1 and hidden = 1: the same number in all rows.
template <typename T>
void check_logits(const std::vector<float>& logits, int64_t argmax, float own, float nll) {
  const auto count = static_cast<int64_t>(logits.size());
  for (int64_t tokens : {1, 66}) {
    const int64_t stride = tokens == 1 ? 1 : 8;
    Case<T> each(tokens, count, 1, stride, stride, 0);
    for (int64_t t = 0; t < tokens; ++t) each.hidden(t, 0) = from_float<T>(1.0f);
    for (int64_t v = 0; v < count; ++v) each.head(v, 0) = from_float<T>(logits[static_cast<size_t>(v)]);
    for (int64_t reference :
         {argmax, argmax == 0 ? count - 1 : argmax - 1, argmax == count - 1 ? 0 : argmax + 1}) {
      std::fill(each.reference_.begin(), each.reference_.end(), reference);
      const float logit = to_float(each.head(reference, 0));
      // own: the logit of argmax, from which nll is counted.
      const float expected = std::isfinite(nll) ? nll + own - logit : std::isnan(nll) ? nll : own - logit;
      each.for_each_kernel([&](int kernel, const Found& found) {
        for (int64_t t = 0; t < tokens; ++t) {
          const float value = found.nll[static_cast<size_t>(t)];
          const bool right =
              found.mismatch[static_cast<size_t>(t)] == (reference != argmax) &&
              (std::isnan(expected) ? std::isnan(value)
                                    : value == expected || std::fabs(value - expected) < 1e-5f);
          if (t == 0 || !right)
            expect(right,
                   "kernel %d, %d bytes, %lld logits, argmax %lld, reference %lld: mismatch %d, nll %g, "
                   "not %g",
                   kernel, static_cast<int>(sizeof(T)), static_cast<long long>(count),
                   static_cast<long long>(argmax), static_cast<long long>(reference),
                   found.mismatch[static_cast<size_t>(t)], static_cast<double>(value),
                   static_cast<double>(expected));
        }
      });
    }
  }
}

template <typename T>
void check_special() {
  const float log2 = std::log(2.0f), log500 = std::log(500.0f);
  std::vector<float> logits(500, 0.0f);
  check_logits<T>(logits, 0, 0.0f, log500);  // all tie
  for (size_t first : {0u, 127u, 128u, 499u}) {
    std::fill(logits.begin(), logits.end(), -60.0f);
    logits[first] = 4.0f;
    check_logits<T>(logits, static_cast<int64_t>(first), 4.0f, 0.0f);
    if (first != 499) {
      logits[499] = 4.0f;  // a tie across tiles
      check_logits<T>(logits, static_cast<int64_t>(first), 4.0f, log2);
    }
    logits[499] = kNan;
    if (first != 499) check_logits<T>(logits, 499, kNan, kNan);
    logits[first] = -kNan;
    check_logits<T>(logits, static_cast<int64_t>(first), kNan, kNan);
    std::fill(logits.begin(), logits.end(), 1.0f);
    logits[first] = kInfinity;  // logsumexp is infinite: infinity, or NaN of its own token
    check_logits<T>(logits, static_cast<int64_t>(first), kInfinity, kInfinity);
    std::fill(logits.begin(), logits.end(), -kInfinity);
    logits[first] = -3.0f;
    check_logits<T>(logits, static_cast<int64_t>(first), -3.0f, 0.0f);
  }
  std::fill(logits.begin(), logits.end(), -kInfinity);
  check_logits<T>(logits, 0, -kInfinity, kInfinity);
  check_logits<T>({2.0f}, 0, 2.0f, 0.0f);
}

// A row's bits must not depend on the number of rows.
template <typename T>
void check_invariance(CudaKernel kernel, Random& random) {
  Case<T> each(300, 1000, 128, 128, 128, 0);
  each.fill(false, random);
  bool possible = false;
  const Found all = each.run(kernel, 300, &possible);
  if (!possible) return;
  for (int64_t rows : {1, 17, 33, 64, 65, 129, 300}) {
    const Found found = each.run(kernel, rows, &possible);
    if (!possible) continue;
    bool same = true;
    for (int64_t t = 0; t < rows; ++t)
      same = same && found.mismatch[static_cast<size_t>(t)] == all.mismatch[static_cast<size_t>(t)] &&
             same_bits(found.nll[static_cast<size_t>(t)], all.nll[static_cast<size_t>(t)]);
    expect(same, "kernel %d, %d bytes: the bits differ between T %lld and T 300", static_cast<int>(kernel),
           static_cast<int>(sizeof(T)), static_cast<long long>(rows));
  }
}

template <typename T>
void check_all() {
  Random random(1);
  const std::vector<int64_t> tokens = {1, 2, 8, 16, 17, 64, 65, 129, 300};
  const std::vector<int64_t> vocabularies = {1, 7, 16, 64, 130, 513, 1000};
  const std::vector<int64_t> depths = {0, 1, 8, 16, 63, 64, 65, 123, 512};
  for (size_t i = 0; i < tokens.size() * vocabularies.size(); ++i) {
    const int64_t rows = tokens[i % 9], vocabulary = vocabularies[i % 7], D = depths[(i + i / 9) % 9];
    const int64_t even = (D + 15) / 16 * 16;
    for (const bool integers : {true, false}) {
      for (Case<T> each :
           {Case<T>(rows, vocabulary, D, even, even, 0), Case<T>(rows, vocabulary, D, D + 1, D + 3, 1)}) {
        each.fill(integers, random);
        check_sums(each, integers);
      }
    }
  }
  Case<T> none(0, 10, 8, 8, 8, 0);
  none.fill(true, random);
  none.for_each_kernel([](int, const Found& found) { expect(found.nll.empty(), "no tokens"); });
  check_special<T>();
  check_invariance<T>(CudaKernel::kBest, random);
  check_invariance<T>(CudaKernel::kMma, random);
  check_invariance<T>(CudaKernel::kHopper, random);
}

}  // namespace

int main() {
  check_all<uint16_t>();
  check_all<float>();
  return finish();
}
