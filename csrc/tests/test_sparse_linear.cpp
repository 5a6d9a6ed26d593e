#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../kernels/cpu/sparse_linear.h"
#include "../kernels/cpu/sparse_pack.h"
#include "../kernels/cpu/store_float.h"
#include "check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

// A weight packed from random entries, of which about one in `rarity` is kept.
struct Packed {
  Packed(Random& random, int64_t N, int64_t K, int64_t rarity)
      : row_bytes((K + 7) / 8),
        mask(N * row_bytes),
        weight(N * K),
        layout(sparse_layout(N, K)),
        rows(layout.panels * layout.blocks * layout.panel_rows),
        steps(layout.panels * layout.blocks * layout.groups),
        starts(static_cast<size_t>(layout.panels * layout.blocks + 1)),
        order{mask.data(), row_bytes, N, K, rows.data(), steps.data()} {
    for (int64_t i = 0; i < N * row_bytes; ++i) mask[i] = 0;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < K; ++k) {
        const bool kept = random.integer(1, rarity) == 1;
        const float dropped = std::numeric_limits<float>::quiet_NaN();  // must not count
        weight[n * K + k] = kept ? random.uniform() : dropped;
        if (kept)
          mask[n * row_bytes + k / 8] = static_cast<uint8_t>(mask[n * row_bytes + k / 8] | 1 << k % 8);
      }
    }
    sparse_order(order, 2);
    sparse_starts(layout, steps.data(), starts.data());
  }

  int64_t row_bytes;
  GuardedBuffer<uint8_t> mask;
  GuardedBuffer<float> weight;
  SparseLayout layout;
  GuardedBuffer<uint16_t> rows;
  GuardedBuffer<uint8_t> steps;
  std::vector<SparseStart> starts;
  SparseOrder order;
};

// The documented sum, in scalar code: the kernels must give its bits.
float dot(const Packed& packed, const float* x, int64_t n) {
  float sum = 0.0f;
  for (int64_t k = 0; k < packed.order.K; ++k) {
    if (packed.order.mask[n * packed.row_bytes + k / 8] >> (k % 8) & 1) {
      sum = std::fmaf(const_cast<Packed&>(packed).weight[n * packed.order.K + k], x[k], sum);
    }
  }
  return sum;
}

void test_shape(CpuIsa isa, int64_t M, int64_t N, int64_t K, int64_t rarity, bool with_bias) {
  Random random(static_cast<uint64_t>((M * 1000 + N) * 1000 + K));
  Packed packed(random, N, K, rarity);
  const SparseStart end = packed.starts.back();
  GuardedBuffer<float> values(end.step * kSparseLanes);
  GuardedBuffer<uint8_t> columns(end.word * kSparseLanes * kSparseWord);
  sparse_pack({FloatType::kFloat32, packed.weight.data(), K, packed.order, values.data(), columns.data()}, 2);

  const int64_t x_stride = K + 1;
  const int64_t x_size = M == 0 ? 0 : (M - 1) * x_stride + K;
  GuardedBuffer<float> x(x_size), y(M * N), bias(N);
  GuardedBuffer<uint16_t> narrow_x(x_size), narrow_y(M * N);
  for (int64_t i = 0; i < x_size; ++i) {
    narrow_x[i] = bfloat16_bits(random.uniform());
    x[i] = float_from_bfloat16(narrow_x[i]);
  }
  for (int64_t n = 0; n < N; ++n) bias[n] = random.uniform();
  SparseLinear args = {
      FloatType::kFloat32,
      x.data(),
      x_stride,
      {values.data(), end.step, columns.data(), end.word, packed.rows.data(), packed.steps.data(), N, K},
      with_bias ? bias.data() : nullptr,
      M,
      y.data()};
  sparse_linear(isa, args, 2);
  args.type = FloatType::kBfloat16;
  args.x = narrow_x.data();
  args.y = narrow_y.data();
  sparse_linear(isa, args, 2);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const float expected = dot(packed, x.data() + m * x_stride, n) + (with_bias ? bias[n] : 0.0f);
      CHECK(y[m * N + n] == expected);
      CHECK(narrow_y[m * N + n] == bfloat16_bits(expected));
    }
  }

  // Whatever the packed tensors hold, nothing is read or written outside of them.
  for (int64_t i = 0; i < end.word * kSparseLanes * kSparseWord; ++i) {
    columns[i] = static_cast<uint8_t>(random.bits());
  }
  for (int64_t i = 0; i < packed.layout.panels * packed.layout.blocks * packed.layout.panel_rows; ++i) {
    packed.rows[i] = static_cast<uint16_t>(random.bits());
  }
  sparse_linear(isa, args, 2);
  args.weight.value_steps += 1;
  bool refused = M == 0 || N == 0;
  try {
    sparse_linear(isa, args, 2);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    if (isa > CpuIsa::kAvx512) return;  // the same kernels
    for (int64_t K : {0, 1, 8, 63, 126, 127, 128, 255, 300}) {
      for (int64_t M : {0, 1, 3, 4, 17, 40, 64, 70}) {
        for (int64_t N : {0, 1, 16, 33}) {
          test_shape(isa, M, N, K, 2, true);
          test_shape(isa, M, N, K, 10, false);
        }
      }
    }
    test_shape(isa, 5, 1030, 130, 1, true);
    test_shape(isa, 1, 600, 260, 20, true);
  });
}
