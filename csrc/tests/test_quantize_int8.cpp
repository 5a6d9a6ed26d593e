#include <cmath>
#include <cstring>
#include <limits>

#include "../kernels/cpu/quantize_int8.h"
#include "../kernels/cpu/store_float.h"
#include "check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

void store_float(void* array, FloatType type, int64_t index, float value) {
  store_floats(array, type, index, &value, 1);
}

float load(const void* x, FloatType type, int64_t index) {
  return type == FloatType::kFloat32 ? static_cast<const float*>(x)[index]
                                     : float_from_bfloat16(static_cast<const uint16_t*>(x)[index]);
}

// The equations of quantize_int8.h, one element at a time.
float quantize_row(const float* x, int64_t K, int8_t* qx) {
  float absmax = 0.0f;
  bool finite = true;
  for (int64_t k = 0; k < K; ++k) {
    finite = finite && std::isfinite(x[k]);
    absmax = std::fmax(absmax, std::fabs(x[k]));
  }
  const float scale = finite ? absmax / 127.0f : std::numeric_limits<float>::quiet_NaN();
  for (int64_t k = 0; k < K; ++k) {
    const float q = finite && scale > 0.0f ? std::nearbyint(x[k] / scale) : 0.0f;
    qx[k] = static_cast<int8_t>(std::fmin(127.0f, std::fmax(-127.0f, q)));
  }
  return scale;
}

void test_shape(CpuIsa isa, FloatType type, int64_t M, int64_t K, int64_t stride, float magnitude) {
  Random random(static_cast<uint64_t>(M * 1000 + K));
  const int64_t elements = M == 0 ? 0 : (M - 1) * stride + K;
  GuardedBuffer<float> wide(elements);  // only the half of it that bfloat16 needs is used then
  GuardedBuffer<uint16_t> narrow(elements);
  void* x = type == FloatType::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data();
  for (int64_t i = 0; i < elements; ++i) store_float(x, type, i, random.uniform() * magnitude);
  if (M > 2 && K > 0) {
    for (int64_t k = 0; k < K; ++k) store_float(x, type, k, 0.0f);
    store_float(x, type, stride + K - 1, std::numeric_limits<float>::infinity());
    store_float(x, type, 2 * stride, std::numeric_limits<float>::quiet_NaN());
  }
  GuardedBuffer<int8_t> qx(M * K);
  GuardedBuffer<float> scale(M);
  quantize_int8(isa, {x, type, stride, M, K, qx.data(), scale.data()}, 2);
  std::vector<float> row(static_cast<size_t>(K));
  std::vector<int8_t> expected(static_cast<size_t>(K));
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) row[static_cast<size_t>(k)] = load(x, type, m * stride + k);
    const float expected_scale = quantize_row(row.data(), K, expected.data());
    CHECK(scale[m] == expected_scale || (std::isnan(scale[m]) && std::isnan(expected_scale)));
    CHECK(K == 0 || std::memcmp(qx.data() + m * K, expected.data(), static_cast<size_t>(K)) == 0);
  }
}

// Quotients at a half and a few units in the last place beside it, in every lane.
void test_near_halves(CpuIsa isa, FloatType type) {
  Random random(17);
  for (int64_t K : {64, 200}) {
    for (int round = 0; round < 200; ++round) {
      std::vector<float> row(static_cast<size_t>(K));
      const float absmax =
          std::ldexp(1.0f + std::fabs(random.uniform()), static_cast<int>(random.integer(-90, 90)));
      for (int64_t k = 0; k < K; ++k) {
        float near = (static_cast<float>(random.integer(-127, 126)) + 0.5f) * (absmax / 127.0f);
        for (int64_t steps = random.integer(0, 3); steps > 0; --steps) {
          near = std::nextafter(near, random.bits() % 2 == 0 ? 0.0f : 2.0f * near);
        }
        row[static_cast<size_t>(k)] = k == K / 2 ? absmax : near;
      }
      GuardedBuffer<float> wide(K);
      GuardedBuffer<uint16_t> narrow(K);
      void* x = type == FloatType::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data();
      store_floats(x, type, 0, row.data(), K);
      for (int64_t k = 0; k < K; ++k) row[static_cast<size_t>(k)] = load(x, type, k);
      GuardedBuffer<int8_t> qx(K);
      GuardedBuffer<float> scale(1);
      std::vector<int8_t> expected(static_cast<size_t>(K));
      quantize_int8(isa, {x, type, K, 1, K, qx.data(), scale.data()}, 1);
      CHECK(scale[0] == quantize_row(row.data(), K, expected.data()));
      CHECK(std::memcmp(qx.data(), expected.data(), static_cast<size_t>(K)) == 0);
    }
  }
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    for (FloatType type : {FloatType::kFloat32, FloatType::kBfloat16}) {
      test_near_halves(isa, type);
      for (float magnitude : {1.0f, 1e-44f, 1e-38f, 3e38f}) {
        for (int64_t K : {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 123, 130}) {
          for (int64_t M : {0, 1, 5, 40}) test_shape(isa, type, M, K, K + 3, magnitude);
        }
      }
    }
  });
}
