// masked_linear on a GPU: every kernel that can take the arguments, against sums in double precision on the
// CPU. benchmarks/cuda/on_device.sh builds and runs it, also under compute-sanitizer.
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../kernels/cuda/masked_linear.h"
#include "cuda_check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Shape {
  int64_t V, M, N, K;
};

// How rows lie in memory.
enum class Layout { kAligned, kContiguous, kOdd };
constexpr Layout kLayouts[] = {Layout::kAligned, Layout::kContiguous, Layout::kOdd};

int64_t stride_of(Layout layout, int64_t size) {
  return layout == Layout::kAligned ? (size + 15) / 16 * 16 : layout == Layout::kContiguous ? size : size + 1;
}

enum class Contents { kIntegers, kFloats, kSpecial };

// Rows of `size` elements, and what lies between them: NaN, that must not count.
template <typename T>
struct Rows {
  int64_t rows, size, stride;
  std::vector<T> all;

  Rows(int64_t rows_, int64_t size_, int64_t stride_, T gap)
      : rows(rows_),
        size(size_),
        stride(stride_),
        all(static_cast<size_t>(rows_ == 0 ? 0 : (rows_ - 1) * stride_ + size_), gap) {}
  T& at(int64_t row, int64_t i) { return all[static_cast<size_t>(row * stride + i)]; }
};

template <typename T>
class Case {
 public:
  Case(const Shape& shape, Layout layout, Contents contents, bool with_bias)
      : shape_(shape),
        contents_(contents),
        with_bias_(with_bias),
        random_(static_cast<uint64_t>(((shape.V * 1000 + shape.M) * 1000 + shape.N) * 1000 + shape.K)),
        x_(shape.M, shape.K, stride_of(layout, shape.K), from_float<T>(kNan)),
        weight_(shape.N, shape.K, stride_of(layout, shape.K), from_float<T>(kNan)),
        mask_(shape.V * shape.N, (shape.K + 7) / 8, stride_of(layout, (shape.K + 7) / 8), 0xff),
        bias_(static_cast<size_t>(shape.N)),
        offset_(layout == Layout::kOdd ? 1 : 0) {
    fill();
    device_x_ = std::make_unique<DeviceBuffer<T>>(x_.all, offset_);
    device_weight_ = std::make_unique<DeviceBuffer<T>>(weight_.all, offset_);
    device_mask_ = std::make_unique<DeviceBuffer<uint8_t>>(mask_.all, offset_);
    device_bias_ = std::make_unique<DeviceBuffer<float>>(bias_);
  }

  // y of the first masks and rows.
  std::vector<T> run(CudaKernel kernel, int64_t V, int64_t M, bool* possible) {
    DeviceBuffer<T> y(V * M * shape_.N);
    const MaskedLinear args = {float_type<T>(),
                               device_x_->data(),
                               x_.stride,
                               device_weight_->data(),
                               weight_.stride,
                               device_mask_->data(),
                               mask_.stride,
                               mask_.stride * shape_.N,
                               with_bias_ ? device_bias_->data() : nullptr,
                               V,
                               M,
                               shape_.N,
                               shape_.K,
                               y.data()};
    *possible = masked_linear_possible(kernel, args);
    if (!*possible) return {};
    masked_linear_cuda(kernel, args, stream_);
    return y.host();
  }

  void check() {
    if (left_out()) return;
    expected();
    for (int kernel = 0; kernel < kCudaKernels; ++kernel) {
      bool possible = false;
      const std::vector<T> found = run(CudaKernel(kernel), shape_.V, shape_.M, &possible);
      if (!possible) {
        const bool always = CudaKernel(kernel) == CudaKernel::kBest || CudaKernel(kernel) == CudaKernel::kMma;
        if (always) expect(false, "kernel %d is not possible", kernel);
        continue;
      }
      int64_t wrong = 0, first_wrong = -1;
      for (size_t i = 0; i < found.size(); ++i) {
        if (is_right(found[i], i)) continue;
        if (wrong++ == 0) first_wrong = static_cast<int64_t>(i);
      }
      const double value = wrong == 0 ? 0.0 : to_float(found[static_cast<size_t>(first_wrong)]);
      const double right = wrong == 0 ? 0.0 : sums_[static_cast<size_t>(first_wrong)];
      expect(wrong == 0,
             "kernel %d, %d bytes, V %lld, M %lld, N %lld, K %lld, offset %lld, contents %d: %lld wrong, "
             "first %lld: "
             "%.9g, not %.9g",
             kernel, static_cast<int>(sizeof(T)), static_cast<long long>(shape_.V),
             static_cast<long long>(shape_.M), static_cast<long long>(shape_.N),
             static_cast<long long>(shape_.K), static_cast<long long>(offset_), static_cast<int>(contents_),
             static_cast<long long>(wrong), static_cast<long long>(first_wrong), value, right);
    }
  }

  // A row's bits must not depend on the number of rows or masks that a kernel is given.
  void check_invariance(CudaKernel kernel, const std::vector<int64_t>& fewer_rows) {
    bool possible = false;
    const std::vector<T> all = run(kernel, shape_.V, shape_.M, &possible);
    if (!possible) return;
    for (int64_t M : fewer_rows) {
      for (int64_t V : {int64_t{1}, int64_t{2}, shape_.V}) {
        const std::vector<T> found = run(kernel, V, M, &possible);
        if (!possible) continue;
        bool same = true;
        for (int64_t v = 0; v < V; ++v)
          for (int64_t i = 0; i < M * shape_.N; ++i)
            same = same && same_bits(found[static_cast<size_t>(v * M * shape_.N + i)],
                                     all[static_cast<size_t>(v * shape_.M * shape_.N + i)]);
        expect(same, "kernel %d, %d bytes: the bits differ between V %lld, M %lld and V %lld, M %lld",
               static_cast<int>(kernel), static_cast<int>(sizeof(T)), static_cast<long long>(V),
               static_cast<long long>(M), static_cast<long long>(shape_.V), static_cast<long long>(shape_.M));
      }
    }
  }

 private:
  float number() {
    return contents_ == Contents::kFloats ? to_float(from_float<T>(random_.uniform()))
                                          : static_cast<float>(random_.integer(-3, 3));
  }
  bool kept(int64_t row, int64_t k) { return ((mask_.at(row, k / 8) >> (k % 8)) & 1) != 0; }

  void fill() {
    for (int64_t m = 0; m < shape_.M; ++m)
      for (int64_t k = 0; k < shape_.K; ++k) x_.at(m, k) = from_float<T>(number());
    for (int64_t n = 0; n < shape_.N; ++n)
      for (int64_t k = 0; k < shape_.K; ++k) weight_.at(n, k) = from_float<T>(number());
    for (int64_t row = 0; row < shape_.V * shape_.N; ++row)
      for (int64_t i = 0; i < mask_.size; ++i) {
        const int64_t bits = shape_.K - 8 * i;  // 0 beyond K
        mask_.at(row, i) = static_cast<uint8_t>(random_.bits() & (bits >= 8 ? 0xff : (1 << bits) - 1));
      }
    for (float& each : bias_) each = number();
    if (contents_ != Contents::kSpecial || shape_.K == 0) return;
    // Weights that no mask keeps, or only some do; in x, one of a row, so that infinities do not meet.
    for (int64_t n = 0; n < shape_.N; ++n) {
      weight_.at(n, random_.integer(0, shape_.K - 1)) = from_float<T>(n % 3 == 0   ? kNan
                                                                      : n % 3 == 1 ? kInfinity
                                                                                   : 1.0f);
      const int64_t dropped = random_.integer(0, shape_.K - 1);
      weight_.at(n, dropped) = from_float<T>(kNan);
      for (int64_t v = 0; v < shape_.V; ++v)
        mask_.at(v * shape_.N + n, dropped / 8) &= static_cast<uint8_t>(~(1 << (dropped % 8)));
    }
    for (int64_t m = 0; m < shape_.M; m += 3)
      x_.at(m, random_.integer(0, shape_.K - 1)) = from_float<T>(m % 2 == 0 ? kInfinity : kNan);
  }

  void expected() {
    const Shape& s = shape_;
    sums_.assign(static_cast<size_t>(s.V * s.M * s.N), 0.0);
    magnitudes_ = sums_;
    std::vector<double> turned(static_cast<size_t>(s.K * s.N));
    for (int64_t v = 0; v < s.V; ++v) {
      for (int64_t n = 0; n < s.N; ++n)
        for (int64_t k = 0; k < s.K; ++k)
          turned[static_cast<size_t>(k * s.N + n)] = kept(v * s.N + n, k) ? to_float(weight_.at(n, k)) : 0.0;
      for (int64_t m = 0; m < s.M; ++m) {
        double* const sums = sums_.data() + (v * s.M + m) * s.N;
        double* const magnitudes = magnitudes_.data() + (v * s.M + m) * s.N;
        for (int64_t k = 0; k < s.K; ++k) {
          const double factor = to_float(x_.at(m, k));
          const double* const row = turned.data() + k * s.N;
          for (int64_t n = 0; n < s.N; ++n) {
            sums[n] += factor * row[n];
            magnitudes[n] += std::fabs(factor * row[n]);
          }
        }
        for (int64_t n = 0; with_bias_ && n < s.N; ++n) {
          sums[n] += bias_[static_cast<size_t>(n)];
          magnitudes[n] += std::fabs(bias_[static_cast<size_t>(n)]);
        }
      }
    }
  }

  bool is_right(T found, size_t i) const {
    const double value = to_float(found), right = sums_[i];
    if (std::isnan(right)) return std::isnan(value);
    if (std::isinf(right)) return value == right;
    // Small integers: every order is exact.
    if (contents_ != Contents::kFloats) return value == to_float(from_float<T>(static_cast<float>(right)));
    const double bound = 2.0 * static_cast<double>(shape_.K + 2) * 0x1p-24 * magnitudes_[i];
    const double rounding = std::fabs(right) * (sizeof(T) == 2 ? 0x1p-8 : 0x1p-24);
    return std::fabs(value - right) <= bound + rounding * (1.0 + 0x1p-7);
  }

  Shape shape_;
  Contents contents_;
  bool with_bias_;
  Random random_;
  Rows<T> x_, weight_;
  Rows<uint8_t> mask_;
  std::vector<float> bias_;
  int64_t offset_;
  std::unique_ptr<DeviceBuffer<T>> device_x_, device_weight_;
  std::unique_ptr<DeviceBuffer<uint8_t>> device_mask_;
  std::unique_ptr<DeviceBuffer<float>> device_bias_;
  std::vector<double> sums_, magnitudes_;
  Stream stream_;
};

template <typename T>
void check_all() {
  const std::vector<int64_t> tokens = {1, 2, 8, 16, 17, 64, 65, 129, 300};
  const std::vector<int64_t> columns = {1, 7, 16, 64, 130, 513, 1000};
  const std::vector<int64_t> depths = {0, 1, 8, 16, 63, 64, 65, 123, 512};
  const std::vector<int64_t> masks = {1, 2, 3, 8};
  // Every pair of tokens and columns once, with all depths and numbers of masks in turn.
  for (size_t i = 0; i < tokens.size() * columns.size(); ++i) {
    const Shape shape = {masks[i % 4], tokens[i % 9], columns[i % 7], depths[(i + i / 9) % 9]};
    const auto contents = Contents(i / 2 % 3);
    for (Layout layout : kLayouts) Case<T>(shape, layout, contents, i % 2 == 0).check();
  }
  // As many tiles as a large GPU has multiprocessors, and more.
  for (Layout layout : kLayouts) Case<T>({1, 1100, 2050, 65}, layout, Contents::kIntegers, true).check();
  Case<T>({1, 1100, 2048, 64}, Layout::kContiguous, Contents::kFloats, false).check();
  if (sizeof(T) == 2) {  // several tiles of rows for a block, and several turns of a ring in shared memory
    Case<T>({1, 1, 6000, 4096}, Layout::kAligned, Contents::kFloats, true).check();
    Case<T>({3, 16, 1300, 4096}, Layout::kAligned, Contents::kFloats, false).check();
    Case<T>({8, 5, 1100, 4096}, Layout::kAligned, Contents::kIntegers, true).check();
    Case<T>({1, 3, 300, 11008}, Layout::kAligned, Contents::kSpecial, true).check();
    // Chunks of K, as one tile of rows for a block, and as two.
    Case<T>({1, 16, 300, 11008}, Layout::kAligned, Contents::kSpecial, true).check();
    Case<T>({1, 16, 2200, 11008}, Layout::kAligned, Contents::kFloats, true).check();
    Case<T>({3, 9, 50, 14336}, Layout::kAligned, Contents::kIntegers, true).check();
  }
  for (const Shape& empty : {Shape{0, 3, 5, 8}, Shape{2, 0, 5, 8}, Shape{2, 3, 0, 8}})
    Case<T>(empty, Layout::kContiguous, Contents::kIntegers, false).check();

  Case<T> many({7, 300, 130, 123}, Layout::kAligned, Contents::kFloats, true);
  Case<T> few({7, 16, 130, 123}, Layout::kAligned, Contents::kFloats, true);
  many.check_invariance(CudaKernel::kMma, {1, 17, 65, 300});
  many.check_invariance(CudaKernel::kHopper, {64, 65, 300});
  few.check_invariance(CudaKernel::kFewTokens, {1, 2, 8, 16});
  few.check_invariance(CudaKernel::kFewTokensStream, {1, 2, 8, 16});
  Case<T> deep({8, 16, 70, 4096}, Layout::kAligned, Contents::kFloats, true);
  deep.check_invariance(CudaKernel::kFewTokensStream, {1, 8, 9, 16});
  Case<T> deeper({8, 16, 70, 11008}, Layout::kAligned, Contents::kFloats, true);
  deeper.check_invariance(CudaKernel::kFewTokensStream, {1, 8, 9, 16});
}

void check_refusal() {
  MaskedLinear args = {};
  args.M = 1 << 20;
  args.type = FloatType::kFloat32;
  if (masked_linear_possible(CudaKernel::kHopper, args)) return;
  bool thrown = false;
  try {
    masked_linear_cuda(CudaKernel::kHopper, args, nullptr);
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  expect(thrown, "a kernel that is not possible was run");
}

}  // namespace

int main() {
  check_all<uint16_t>();
  check_all<float>();
  check_refusal();
  return finish();
}
