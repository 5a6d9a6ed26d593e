#include "../kernels/cpu/mask_bits.h"
#include "check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

void test_shape(CpuIsa isa, int64_t N, int64_t K) {
  Random random(static_cast<uint64_t>(N * 1000 + K));
  const int64_t stride = K + 3, row_bytes = (K + 7) / 8, packed_stride = row_bytes + 2;
  GuardedBuffer<uint8_t> mask(N == 0 ? 0 : (N - 1) * stride + K);
  GuardedBuffer<uint8_t> packed(N == 0 ? 0 : (N - 1) * packed_stride + row_bytes);
  GuardedBuffer<uint8_t> unpacked(N == 0 ? 0 : (N - 1) * stride + K);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) mask[n * stride + k] = random.bits() & 1u;
  }
  pack_mask(isa, {mask.data(), stride, N, K, packed.data(), packed_stride}, 2);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < row_bytes * 8; ++k) {
      const int bit = packed[n * packed_stride + k / 8] >> (k % 8) & 1;
      CHECK(bit == (k < K ? mask[n * stride + k] : 0));
    }
  }
  unpack_mask(isa, {packed.data(), packed_stride, N, K, unpacked.data(), stride}, 2);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) CHECK(unpacked[n * stride + k] == mask[n * stride + k]);
    for (int64_t k = K; n + 1 < N && k < stride; ++k)
      CHECK(unpacked[n * stride + k] == 0xa5);  // between the rows
  }
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    for (int64_t N : {0, 1, 3, 40}) {
      for (int64_t K : {0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 513}) test_shape(isa, N, K);
    }
  });
}
