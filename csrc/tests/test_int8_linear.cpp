#include <cmath>
#include <stdexcept>
#include <vector>

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

NO_THREAD_SANITIZER int64_t dot(const int8_t* a, const int8_t* b, int64_t K) {
  int64_t sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += int64_t{a[k]} * b[k];
  return sum;
}

// Tokens that quantize without error: integers times a power of two, 127 among them.
void test_shape(CpuIsa isa, int64_t M, int64_t N, int64_t K, Values values, FloatType type, bool with_bias) {
  Random random(static_cast<uint64_t>(M * 100000 + N * 1000 + K));
  const int64_t stride = K + 5, x_stride = K + 3;
  std::vector<int8_t> qx(static_cast<std::size_t>(M * K));
  std::vector<float> scale_x(static_cast<std::size_t>(M));
  GuardedBuffer<float> x_wide(M == 0 ? 0 : (M - 1) * x_stride + K);
  GuardedBuffer<uint16_t> x_narrow(M == 0 ? 0 : (M - 1) * x_stride + K);
  GuardedBuffer<int8_t> qweight(N == 0 ? 0 : (N - 1) * stride + K);
  GuardedBuffer<float> scale_w(N), bias(N), wide(M * N);
  GuardedBuffer<uint16_t> narrow(M * N);
  for (int64_t m = 0; m < M; ++m) {
    scale_x[m] = K == 0 ? 0.0f : std::ldexp(1.0f, static_cast<int>(random.integer(-20, 20)));
    for (int64_t k = 0; k < K; ++k) {
      qx[m * K + k] = k == 0 ? int8_t{127} : value(random, values, -127);
      x_wide[m * x_stride + k] = qx[m * K + k] * scale_x[m];
      x_narrow[m * x_stride + k] = bfloat16_bits(qx[m * K + k] * scale_x[m]);
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) qweight[n * stride + k] = value(random, values, -128);
    scale_w[n] = random.uniform();
    bias[n] = random.uniform() * 100.0f;
  }
  const bool is_wide = type == FloatType::kFloat32;
  const void* x = is_wide ? static_cast<const void*>(x_wide.data()) : x_narrow.data();
  void* y = is_wide ? static_cast<void*>(wide.data()) : narrow.data();
  int8_linear(isa,
              {type, x, x_stride, qweight.data(), stride, scale_w.data(), with_bias ? bias.data() : nullptr,
               M, N, K, y},
              2);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const int64_t acc = dot(qx.data() + m * K, qweight.data() + n * stride, K);
      float expected = static_cast<float>(acc) * (scale_x[m] * scale_w[n]);
      if (with_bias) expected = expected + bias[n];
      if (is_wide) {
        CHECK(wide[m * N + n] == expected);
      } else {
        CHECK(narrow[m * N + n] == bfloat16_bits(expected));
      }
    }
  }
}

bool refuses_depth(CpuIsa isa, int64_t K) {
  try {
    int8_linear(isa, {FloatType::kFloat32, nullptr, K, nullptr, K, nullptr, nullptr, 0, 0, K, nullptr}, 1);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    for (int64_t K : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 123, 200}) {
      for (int64_t M : {0, 1, 2, 3, 4, 6, 17, 33, 257}) {
        for (int64_t N : {0, 1, 3, 4, 5, 63, 66}) {
          test_shape(isa, M, N, K, Values::kRandom, FloatType::kFloat32, true);
          test_shape(isa, M, N, K, Values::kExtremes, FloatType::kBfloat16, false);
        }
      }
    }
    // Several blocks of K and several tiles of tokens.
    test_shape(isa, 70, 70, 2500, Values::kExtremes, FloatType::kFloat32, true);
    test_shape(isa, 600, 37, 700, Values::kRandom, FloatType::kBfloat16, true);
    test_shape(isa, 300, 70, 1500, Values::kExtremes, FloatType::kBfloat16, false);
    // More tokens than there are threads: each thread packs its own.
    test_shape(isa, 1061, 131, 130, Values::kExtremes, FloatType::kFloat32, true);
    test_shape(isa, 1024, 98, 66, Values::kRandom, FloatType::kBfloat16, true);
    // The weight is packed: one step of K, several blocks of them, a tail of each size.
    test_shape(isa, 513, 33, 1, Values::kExtremes, FloatType::kBfloat16, true);
    test_shape(isa, 800, 48, 1289, Values::kExtremes, FloatType::kFloat32, true);
    // Two, three and four vectors of tokens; the last columns fill no register block and no cache line.
    for (int64_t M : {32, 47, 64, 65}) {
      test_shape(isa, M, 101, 70, Values::kExtremes, FloatType::kFloat32, false);
      test_shape(isa, M, 127, 67, Values::kExtremes, FloatType::kBfloat16, true);
    }
    // Several panels of few tokens, a thread's run of several tiles, and the last of the few tokens.
    for (int64_t M : {1, 4, 5, 8, 11, 16, 24, 25, 64, 65}) {
      test_shape(isa, M, 70, 1100, Values::kExtremes, FloatType::kBfloat16, true);
      test_shape(isa, M, 603, 140, Values::kRandom, FloatType::kFloat32, true);
    }
    test_shape(isa, 9, 5, kInt8LinearMaxK, Values::kExtremes, FloatType::kFloat32, false);
    test_shape(isa, 5, 5, kInt8LinearMaxK, Values::kExtremes, FloatType::kFloat32, false);
    CHECK(!refuses_depth(isa, kInt8LinearMaxK));
    CHECK(refuses_depth(isa, kInt8LinearMaxK + 1));
  });
}
