#include <cstring>

#include "../kernels/cpu/apply_mask.h"
#include "check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

template <typename Bits>
void test_shape(CpuIsa isa, FloatType type, int64_t N, int64_t K) {
  Random random(static_cast<uint64_t>(N * 1000 + K));
  const int64_t stride = K + 3, row_bytes = (K + 7) / 8, mask_stride = row_bytes + 2;
  const int64_t weight_size = N == 0 ? 0 : (N - 1) * stride + K;
  const int64_t mask_size = N == 0 ? 0 : (N - 1) * mask_stride + row_bytes;
  GuardedBuffer<Bits> weight(weight_size);
  GuardedBuffer<uint8_t> mask(mask_size);
  GuardedBuffer<Bits> y(N * K);
  for (int64_t i = 0; i < weight_size; ++i) weight[i] = static_cast<Bits>(random.bits());
  // Bits beyond K are set at random too: they must not matter.
  for (int64_t i = 0; i < mask_size; ++i) mask[i] = static_cast<uint8_t>(random.bits());
  apply_mask(isa, {type, weight.data(), stride, mask.data(), mask_stride, N, K, y.data()}, 2);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      const bool kept = mask[n * mask_stride + k / 8] >> (k % 8) & 1;
      CHECK(y[n * K + k] == (kept ? weight[n * stride + k] : Bits{0}));
    }
  }
  GuardedBuffer<Bits> in_place(N * K);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) in_place[n * K + k] = weight[n * stride + k];
  }
  apply_mask(isa, {type, in_place.data(), K, mask.data(), mask_stride, N, K, in_place.data()}, 2);
  CHECK(N * K == 0 || std::memcmp(in_place.data(), y.data(), sizeof(Bits) * static_cast<size_t>(N * K)) == 0);
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    for (int64_t N : {0, 1, 3, 40}) {
      for (int64_t K : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 513}) {
        test_shape<uint32_t>(isa, FloatType::kFloat32, N, K);
        test_shape<uint16_t>(isa, FloatType::kBfloat16, N, K);
      }
    }
  });
}
