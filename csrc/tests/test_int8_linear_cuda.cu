// quantize_int8 and every kernel of int8_linear on a GPU, against plain loops on the CPU, bit by bit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../kernels/cuda/int8_linear.h"
#include "../kernels/cuda/quantize_int8.h"
#include "cuda_check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

long long wide(int64_t value) { return static_cast<long long>(value); }

int64_t up_to_16(int64_t size) { return (size + 15) / 16 * 16; }

// Rows of zeros, of values that underflow, with a NaN or an infinity, and ordinary ones; NaN between the
// rows.
template <typename T>
std::vector<T> make_rows(Random& random, int64_t M, int64_t K, int64_t stride) {
  std::vector<T> rows(static_cast<size_t>(M == 0 ? 0 : (M - 1) * stride + K));
  std::memset(rows.data(), 0xFF, rows.size() * sizeof(T));
  for (int64_t m = 0; m < M; ++m) {
    const int64_t kind = random.integer(0, 9);
    const float size =
        kind == 0 ? 0.0f : std::ldexp(1.0f, kind == 1 ? -130 : static_cast<int>(random.integer(-30, 30)));
    for (int64_t k = 0; k < K; ++k) {
      // Many quotients end with a half: the largest is 127 times a power of two, the others multiples of its
      // half.
      const float half = static_cast<float>(random.integer(-254, 254)) / 2;
      rows[m * stride + k] = from_float<T>(size * (kind < 5 ? half : random.uniform() * 127));
    }
    if (K > 0 && kind < 5) rows[m * stride + random.integer(0, K - 1)] = from_float<T>(-127 * size);
    if (K > 0 && kind == 2 && M > 1)
      rows[m * stride + K - 1] = from_float<T>(m % 2 == 0 ? NAN : -std::numeric_limits<float>::infinity());
  }
  return rows;
}

template <typename T>
float quantize_row(const T* x, int64_t K, int8_t* q) {
  float absmax = 0;
  bool finite = true;
  for (int64_t k = 0; k < K; ++k) {
    absmax = std::max(absmax, std::fabs(to_float(x[k])));
    finite = finite && std::isfinite(to_float(x[k]));
  }
  const float scale = finite ? absmax / 127.0f : NAN;
  for (int64_t k = 0; k < K; ++k)
    q[k] = scale > 0
               ? static_cast<int8_t>(std::clamp(std::nearbyint(to_float(x[k]) / scale), -127.0f, 127.0f))
               : 0;
  return scale;
}

template <typename T>
bool equal(T found, T expected) {
  return std::isnan(to_float(expected)) ? std::isnan(to_float(found)) : same_bits(found, expected);
}

template <typename T>
void check_quantize(Random& random, cudaStream_t stream, int64_t M, int64_t K, int64_t spare,
                    int64_t offset) {
  if (left_out()) return;
  const int64_t x_stride = K + spare, q_stride = K + spare;
  const std::vector<T> rows = make_rows<T>(random, M, K, x_stride);
  const DeviceBuffer<T> x(rows, offset);
  const DeviceBuffer<int8_t> q(M * q_stride, offset);
  const DeviceBuffer<float> scale(M);
  quantize_int8_cuda({float_type<T>(), x.data(), x_stride, M, K, q.data(), q_stride, scale.data()}, stream);
  const std::vector<int8_t> found_q = q.host();
  const std::vector<float> found_scale = scale.host();
  std::vector<int8_t> expected(static_cast<size_t>(q_stride));
  int64_t wrong = 0;
  for (int64_t m = 0; m < M; ++m) {
    std::fill(expected.begin(), expected.end(), int8_t{0});
    wrong += !equal(found_scale[m], quantize_row(rows.data() + m * x_stride, K, expected.data()));
    wrong += !std::equal(expected.begin(), expected.end(), found_q.begin() + m * q_stride);
  }
  expect(wrong == 0, "quantize_int8: M = %lld, K = %lld, %d bytes, spare %lld, offset %lld: %lld wrong",
         wide(M), wide(K), static_cast<int>(sizeof(T)), wide(spare), wide(offset), wide(wrong));
}

struct Case {
  int64_t M, N, K;
  bool aligned, with_bias;
};

template <typename T>
void check_linear(Random& random, cudaStream_t stream, const Case& size) {
  if (left_out()) return;
  const auto [M, N, K, aligned, with_bias] = size;
  const int64_t x_stride = aligned ? up_to_16(K) : K + 3, stride = aligned ? up_to_16(K) : K + 5;
  const int64_t offset = aligned ? 0 : 1, qx_stride = up_to_16(K);
  const std::vector<T> rows = make_rows<T>(random, M, K, x_stride);
  std::vector<int8_t> weight(static_cast<size_t>(N == 0 ? 0 : (N - 1) * stride + K));
  const bool extremes = random.bits() % 2 == 0;
  for (auto& each : weight)
    each = static_cast<int8_t>(extremes ? (random.bits() % 2 == 0 ? -128 : 127) : random.integer(-128, 127));
  std::vector<float> weight_scale(static_cast<size_t>(N)), bias_values(static_cast<size_t>(N));
  for (auto& each : weight_scale) each = random.uniform();
  for (auto& each : bias_values) each = random.uniform() * 100;

  std::vector<int8_t> q(static_cast<size_t>(M * K));
  std::vector<T> expected(static_cast<size_t>(M * N));
  for (int64_t m = 0; m < M; ++m) {
    const float x_scale = quantize_row(rows.data() + m * x_stride, K, q.data() + m * K);
    for (int64_t n = 0; n < N; ++n) {
      int32_t sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += int32_t{q[m * K + k]} * weight[n * stride + k];
      float value = static_cast<float>(sum) * (x_scale * weight_scale[n]);
      if (with_bias) value = value + bias_values[n];
      expected[m * N + n] = from_float<T>(value);
    }
  }

  const DeviceBuffer<T> x(rows, offset);
  const DeviceBuffer<int8_t> qweight(weight, 3 * offset);
  const DeviceBuffer<float> scale(weight_scale, offset), bias(bias_values, offset);
  for (int kernel = 0; kernel < kCudaKernels; ++kernel) {
    const DeviceBuffer<T> y(M * N, offset);
    const DeviceBuffer<int8_t> qx(M * qx_stride);
    const DeviceBuffer<float> scale_x(M);
    const Int8Linear args = {float_type<T>(),
                             x.data(),
                             x_stride,
                             qweight.data(),
                             stride,
                             scale.data(),
                             with_bias ? bias.data() : nullptr,
                             M,
                             N,
                             K,
                             y.data(),
                             qx.data(),
                             qx_stride,
                             scale_x.data()};
    if (!int8_linear_possible(static_cast<CudaKernel>(kernel), args)) continue;
    int8_linear_cuda(static_cast<CudaKernel>(kernel), args, stream);
    const std::vector<T> found = y.host();
    int64_t wrong = 0;
    for (size_t i = 0; i < found.size(); ++i) wrong += !equal(found[i], expected[i]);
    expect(wrong == 0,
           "int8_linear: kernel %d, M = %lld, N = %lld, K = %lld, %d bytes, %saligned: %lld wrong", kernel,
           wide(M), wide(N), wide(K), static_cast<int>(sizeof(T)), aligned ? "" : "un", wide(wrong));
  }
}

}  // namespace

int main() {
  Random random(1);
  {
    const Stream stream;
    for (int64_t K : {0, 1, 7, 8, 63, 64, 123, 4096, 8200, 40000})
      for (int64_t spare : {0, 5, 16})
        for (int64_t M : {1, 9, 700}) {
          if (M * K > 4000000 || (M == 700 && K > 123 && spare != 0)) continue;
          check_quantize<float>(random, stream, M, K, spare, spare % 2);
          check_quantize<uint16_t>(random, stream, M, K, spare, spare % 2);
        }
    check_quantize<float>(random, stream, 0, 8, 0, 0);
    check_quantize<uint16_t>(random, stream, 2000, 264, 0, 0);

    const std::vector<int64_t> columns = {1, 15, 16, 17, 64, 130, 513};
    size_t turn = 0;
    for (int64_t M : {1, 2, 7, 8, 9, 16, 17, 129, 300}) {
      for (int64_t K : {0, 1, 16, 63, 64, 65, 123, 512, 1040}) {
        for (int times = 0; times < 2; ++times, ++turn) {
          const Case size = {M, columns[turn % columns.size()], K, times == 0, turn % 3 != 0};
          if ((turn / 2) % 2 == 0) {
            check_linear<uint16_t>(random, stream, size);
          } else {
            check_linear<float>(random, stream, size);
          }
        }
      }
    }
    check_linear<uint16_t>(random, stream, {16, 513, 1040, true, true});
    check_linear<float>(random, stream, {5, 3000, 1100, true, true});  // 32 rows in a block for few tokens
    check_linear<uint16_t>(random, stream, {12, 3000, 576, true, false});
    check_linear<float>(random, stream, {2, 17, (1 << 17) - 1, true, false});
    // Several tiles of rows for a block, and several turns of a ring in shared memory.
    check_linear<uint16_t>(random, stream, {1, 11000, 4096, true, true});
    check_linear<float>(random, stream, {16, 4100, 4096, true, false});
    check_linear<uint16_t>(random, stream, {16, 11000, 1040, true, true});
    check_linear<float>(random, stream, {7, 300, 11008, true, true});
    check_linear<uint16_t>(random, stream, {1, 3, (1 << 17) - 1, true, true});
    // Rows that a block quantizes for itself, by teams of 8, 4, 2 warps and one, and chunks of K.
    check_linear<uint16_t>(random, stream, {1, 2200, 11008, true, true});
    check_linear<float>(random, stream, {1, 300, 8192, true, true});
    check_linear<uint16_t>(random, stream, {2, 1200, 4096, true, true});
    check_linear<uint16_t>(random, stream, {3, 300, 4096, true, false});
    check_linear<uint16_t>(random, stream, {4, 1200, 4096, true, true});
    check_linear<float>(random, stream, {8, 300, 1024, true, true});
    check_linear<uint16_t>(random, stream, {6, 300, 2048, true, true});
    check_linear<uint16_t>(random, stream, {16, 3300, 11008, true, true});
    check_linear<float>(random, stream, {9, 100, 40000, true, true});
    check_linear<uint16_t>(random, stream, {0, 64, 64, true, true});
    check_linear<uint16_t>(random, stream, {4, 0, 64, true, true});
  }
  return finish();
}
