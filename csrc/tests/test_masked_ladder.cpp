#include <cmath>
#include <limits>

#include "../kernels/cpu/masked_ladder.h"
#include "../kernels/cpu/store_float.h"
#include "check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

struct Shape {
  int64_t V, M, N, K;
};

bool keeps(const MaskedLadder& args, int64_t v, int64_t n, int64_t k) {
  return args.mask[v * args.mask_level_stride + n * args.mask_row_stride + k / 8] >> (k % 8) & 1;
}

// The documented order of the sum, in scalar code: the kernels must give its bits. A padding changes no more
// than the sign of a zero, which == does not see.
float dot(const MaskedLadder& args, int64_t level, int64_t m, int64_t n) {
  const float* x = static_cast<const float*>(args.x) + m * args.x_stride;
  const float* weight = static_cast<const float*>(args.weight) + n * args.weight_stride;
  float sum = 0.0f;
  for (int64_t v = args.V - 1; v >= level; --v) {
    for (int64_t k = 0; k < args.K; ++k) {
      const bool added = keeps(args, v, n, k) && (v == args.V - 1 || !keeps(args, v + 1, n, k));
      if (added) sum = std::fmaf(weight[k], x[k], sum);
    }
  }
  return sum + (args.bias == nullptr ? 0.0f : args.bias[n]);
}

void test_shape(CpuIsa isa, Shape shape, bool with_bias) {
  const auto [V, M, N, K] = shape;
  Random random(static_cast<uint64_t>(((V * 1000 + M) * 1000 + N) * 1000 + K));
  const int64_t x_stride = K + 1, weight_stride = K + 2, row_bytes = (K + 7) / 8 + 1;
  const int64_t x_size = M == 0 ? 0 : (M - 1) * x_stride + K;
  const int64_t weight_size = N == 0 ? 0 : (N - 1) * weight_stride + K;
  GuardedBuffer<float> x(x_size), weight(weight_size), bias(N), y(V * M * N);
  GuardedBuffer<uint16_t> narrow_x(x_size), narrow_weight(weight_size), narrow_y(V * M * N);
  GuardedBuffer<uint8_t> mask(V * N * row_bytes);
  for (int64_t i = 0; i < x_size; ++i) {
    narrow_x[i] = bfloat16_bits(random.uniform());
    x[i] = float_from_bfloat16(narrow_x[i]);
  }
  for (int64_t i = 0; i < V * N * row_bytes; ++i) mask[i] = 0;
  for (int64_t i = 0; i < weight_size; ++i) {
    narrow_weight[i] = bfloat16_bits(std::numeric_limits<float>::quiet_NaN());  // must not count
  }
  for (int64_t n = 0; n < N; ++n) {
    bias[n] = random.uniform();
    for (int64_t k = 0; k < K; ++k) {
      const int64_t levels = random.integer(0, V);  // how many of them keep it
      for (int64_t v = 0; v < levels; ++v) {
        uint8_t& byte = mask[(v * N + n) * row_bytes + k / 8];
        byte = static_cast<uint8_t>(byte | 1 << k % 8);
      }
      if (levels > 0) narrow_weight[n * weight_stride + k] = bfloat16_bits(random.uniform());
    }
  }
  for (int64_t i = 0; i < weight_size; ++i) weight[i] = float_from_bfloat16(narrow_weight[i]);

  MaskedLadder args = {FloatType::kFloat32,
                       x.data(),
                       x_stride,
                       weight.data(),
                       weight_stride,
                       mask.data(),
                       row_bytes,
                       N * row_bytes,
                       with_bias ? bias.data() : nullptr,
                       V,
                       M,
                       N,
                       K,
                       y.data()};
  masked_ladder(isa, args, 2);
  MaskedLadder narrow = args;
  narrow.type = FloatType::kBfloat16;
  narrow.x = narrow_x.data();
  narrow.weight = narrow_weight.data();
  narrow.y = narrow_y.data();
  masked_ladder(isa, narrow, 2);
  for (int64_t v = 0; v < V; ++v) {
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        const float expected = dot(args, v, m, n);
        CHECK(y[(v * M + m) * N + n] == expected);
        CHECK(float_from_bfloat16(narrow_y[(v * M + m) * N + n]) ==
              float_from_bfloat16(bfloat16_bits(expected)));
      }
    }
  }
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    if (isa > CpuIsa::kAvx512) return;  // the same kernels
    for (int64_t K : {0, 1, 8, 63, 127, 128, 300}) {
      for (int64_t M : {0, 1, 17, 64, 70}) {
        for (int64_t N : {0, 1, 16, 33}) {
          test_shape(isa, {1, M, N, K}, true);
          test_shape(isa, {3, M, N, K}, false);
        }
      }
    }
    test_shape(isa, {0, 3, 4, 5}, true);
    test_shape(isa, {2, 5, 1030, 130}, true);
  });
}
