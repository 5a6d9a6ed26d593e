#include <stdexcept>

#include "../kernels/cpu/int8_linear.h"
#include "../kernels/cpu/store_float.h"
#include "check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

enum class Values { kRandom, kExtremes };

int8_t value(Random& random, Values values, int64_t low) {
  if (values == Values::kRandom) return static_cast<int8_t>(random.integer(low, 127));
  return static_cast<int8_t>(random.bits() % 2 == 0 ? low : 127);
}

void test_shape(CpuIsa isa, int64_t M, int64_t N, int64_t K, Values values, FloatType type, bool with_bias) {
  Random random(static_cast<uint64_t>(M * 100000 + N * 1000 + K));
  const int64_t stride = K + 5;
  GuardedBuffer<int8_t> qx(M * K);
  GuardedBuffer<int8_t> qweight(N == 0 ? 0 : (N - 1) * stride + K);
  GuardedBuffer<float> scale_x(M), scale_w(N), bias(N), wide(M * N);
  GuardedBuffer<uint16_t> narrow(M * N);
  for (int64_t i = 0; i < M * K; ++i) qx[i] = value(random, values, -127);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) qweight[n * stride + k] = value(random, values, -128);
    scale_w[n] = random.uniform();
    bias[n] = random.uniform() * 100.0f;
  }
  for (int64_t m = 0; m < M; ++m) scale_x[m] = random.uniform();
  void* y = type == FloatType::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data();
  int8_linear(isa,
              {qx.data(), scale_x.data(), qweight.data(), stride, scale_w.data(),
               with_bias ? bias.data() : nullptr, M, N, K, y, type},
              2);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      int64_t acc = 0;
      for (int64_t k = 0; k < K; ++k) acc += int64_t{qx[m * K + k]} * qweight[n * stride + k];
      float expected = static_cast<float>(acc) * (scale_x[m] * scale_w[n]);
      if (with_bias) expected = expected + bias[n];
      if (type == FloatType::kFloat32) {
        CHECK(wide[m * N + n] == expected);
      } else {
        CHECK(narrow[m * N + n] == bfloat16_bits(expected));
      }
    }
  }
}

bool refuses_depth(CpuIsa isa, int64_t K) {
  try {
    int8_linear(isa, {nullptr, nullptr, nullptr, K, nullptr, nullptr, 0, 0, K, nullptr, FloatType::kFloat32},
                1);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    for (int64_t K : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 123, 200}) {
      for (int64_t M : {0, 1, 3, 4, 6, 257}) {
        for (int64_t N : {0, 1, 3, 4, 5, 63, 66}) {
          test_shape(isa, M, N, K, Values::kRandom, FloatType::kFloat32, true);
          test_shape(isa, M, N, K, Values::kExtremes, FloatType::kBfloat16, false);
        }
      }
    }
    test_shape(isa, 5, 5, kInt8LinearMaxK, Values::kExtremes, FloatType::kFloat32, false);
    CHECK(!refuses_depth(isa, kInt8LinearMaxK));
    CHECK(refuses_depth(isa, kInt8LinearMaxK + 1));
  });
}
