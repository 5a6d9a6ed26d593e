#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../kernels/cpu/bfloat16_tiles.h"
#include "../kernels/cpu/float32_pieces.h"
#include "../kernels/cpu/gemm_tile.h"
#include "../kernels/cpu/masked_few_tokens.h"
#include "../kernels/cpu/masked_linear.h"
#include "../kernels/cpu/masked_linear_float32.h"
#include "../kernels/cpu/store_float.h"
#include "check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

void store_float(void* array, FloatType type, int64_t index, float value) {
  store_floats(array, type, index, &value, 1);
}

struct Shape {
  int64_t V, M, N, K;
};

float load(const void* x, FloatType type, int64_t index) {
  return type == FloatType::kFloat32 ? static_cast<const float*>(x)[index]
                                     : float_from_bfloat16(static_cast<const uint16_t*>(x)[index]);
}

// Elements of either type; the unused buffer is empty.
struct Matrix {
  Matrix(FloatType type, int64_t size)
      : wide(type == FloatType::kFloat32 ? size : 0),
        narrow(type == FloatType::kBfloat16 ? size : 0),
        data(type == FloatType::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data()) {}
  GuardedBuffer<float> wide;
  GuardedBuffer<uint16_t> narrow;
  void* data;
};

// Every machine with kernels has FMA; calls of fmaf would take most of the test's time.
#define WITH_FMA __attribute__((target("fma")))

WITH_FMA inline float without_denormal(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }

// The order of bfloat16_tiles.h in scalar code.
WITH_FMA float dot_on_tiles(const float* x, const float* weight, int64_t K) {
  float total = 0.0f;
  for (int64_t k0 = 0; k0 < K; k0 += kBfloat16Step) {
    float sums[2] = {0.0f, 0.0f};
    for (int64_t k = k0; k < K && k < k0 + kBfloat16Step; ++k) {
      sums[k % 2] =
          without_denormal(std::fmaf(without_denormal(x[k]), without_denormal(weight[k]), sums[k % 2]));
    }
    total = without_denormal(total + without_denormal(sums[0] + sums[1]));
  }
  return total;
}

float upper_word(float x, uint32_t carry) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + carry) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

struct Pieces {
  Pieces(float x, uint32_t carry) {
    const float value = without_denormal(x);
    of[0] = upper_word(x, carry);
    const float left = without_denormal(value - without_denormal(of[0]));
    of[1] = upper_word(left, 0);
    of[2] = without_denormal(left - of[1]);
  }
  float of[kFloat32Pieces];
};

// The order of float32_pieces.h in scalar code.
WITH_FMA float dot_in_pieces(const float* x, const float* weight, int64_t K) {
  constexpr int kWeight[] = {2, 1, 1, 0, 0, 0}, kX[] = {0, 0, 1, 1, 0, 2};
  const PieceBlocks blocks(K);
  float total = 0.0f, eight = 0.0f;
  for (int64_t first = 0; first < K; first = blocks.after(first)) {
    float block = 0.0f;
    for (int64_t k0 = first; k0 < first + blocks.depth(first); k0 += kBfloat16Step) {
      for (int p = 0; p < 6; ++p) {
        float sums[2] = {0.0f, 0.0f};
        for (int64_t k = k0; k < K && k < k0 + kBfloat16Step; ++k) {
          const float a = without_denormal(Pieces(x[k], 0x8000).of[kX[p]]);
          const float b = without_denormal(Pieces(weight[k], 0).of[kWeight[p]]);
          float& sum = sums[(k - k0) / (kBfloat16Step / 2)];
          sum = without_denormal(std::fmaf(a, b, sum));
        }
        block = without_denormal(block + without_denormal(sums[0] + sums[1]));
      }
    }
    eight = blocks.starts_eight(first) ? block : without_denormal(eight + block);
    if (blocks.ends_eight(first)) {
      total = blocks.is_of_first_eight(first) ? eight : without_denormal(total + eight);
    }
  }
  return total;
}

bool is_small(const float* x, int64_t K) {
  float largest = 0.0f;
  for (int64_t k = 0; k < K; ++k) largest = std::max(largest, std::fabs(x[k]));
  return largest > 0.0f && largest < kSmallRow;
}

// The order of gemm_tile.h for bfloat16 on AVX512-BF16 in scalar code.
WITH_FMA float dot_of_pairs(const float* x, const float* weight, int64_t K) {
  constexpr int64_t kBlock = 2 * kGemmBlockK;
  float total = 0.0f;
  for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
    float block = 0.0f;
    for (int64_t pair = k0; pair < K && pair < k0 + kBlock; pair += 2) {
      for (int64_t k : {pair + 1, pair}) {
        const float w = k < K ? weight[k] : 0.0f, value = k < K ? x[k] : 0.0f;
        block = without_denormal(std::fmaf(without_denormal(value), without_denormal(w), block));
      }
    }
    total += block;
  }
  return total;
}

// The documented order of the sum, in scalar code: the kernels must give its bits.
WITH_FMA float dot(CpuIsa isa, FloatType type, const float* x, const float* weight, int64_t K) {
  if (isa == CpuIsa::kAmx && type == FloatType::kBfloat16) return dot_on_tiles(x, weight, K);
  if (isa == CpuIsa::kAvx512Bf16 && type == FloatType::kBfloat16) return dot_of_pairs(x, weight, K);
  if (isa == CpuIsa::kAmx && !is_small(x, K)) {
    const float sum = dot_in_pieces(x, weight, K);
    if (std::isfinite(sum)) return sum;
  }
  float total = 0.0f;
  for (int64_t k0 = 0; k0 < K; k0 += kGemmBlockK) {
    float block = 0.0f;
    for (int64_t k = k0; k < K && k < k0 + kGemmBlockK; ++k) block = std::fmaf(x[k], weight[k], block);
    total += block;
  }
  return total;
}

// What each variant gives without a bias, [V, M, N].
std::vector<float> products(CpuIsa isa, const MaskedLinear& args) {
  const auto size = [](int64_t rows, int64_t columns) { return static_cast<size_t>(rows * columns); };
  std::vector<float> x(size(args.M, args.K)), weight(size(args.N, args.K)), found;
  for (int64_t m = 0; m < args.M; ++m) {
    for (int64_t k = 0; k < args.K; ++k) {
      x[static_cast<size_t>(m * args.K + k)] = load(args.x, args.type, m * args.x_stride + k);
    }
  }
  for (int64_t v = 0; v < args.V; ++v) {
    for (int64_t n = 0; n < args.N; ++n) {
      const uint8_t* mask = args.mask + v * args.mask_variant_stride + n * args.mask_row_stride;
      for (int64_t k = 0; k < args.K; ++k) {
        const bool kept = mask[k / 8] >> (k % 8) & 1;
        weight[static_cast<size_t>(n * args.K + k)] =
            kept ? load(args.weight, args.type, n * args.weight_stride + k) : 0.0f;
      }
    }
    for (int64_t m = 0; m < args.M; ++m) {
      for (int64_t n = 0; n < args.N; ++n) {
        found.push_back(dot(isa, args.type, x.data() + m * args.K, weight.data() + n * args.K, args.K));
      }
    }
  }
  return found;
}

void test_shape(CpuIsa isa, FloatType type, Shape shape, bool with_bias, float scale = 1.0f) {
  const auto [V, M, N, K] = shape;
  Random random(static_cast<uint64_t>(((V * 1000 + M) * 1000 + N) * 1000 + K));
  const int64_t x_stride = K + 1, weight_stride = K + 2, row_bytes = (K + 7) / 8;
  Matrix x(type, M == 0 ? 0 : (M - 1) * x_stride + K);
  Matrix weight(type, N == 0 ? 0 : (N - 1) * weight_stride + K);
  Matrix y(type, V * M * N);
  GuardedBuffer<uint8_t> mask(V * N * row_bytes);
  GuardedBuffer<float> bias(N);
  for (int64_t i = 0; i < V * N * row_bytes; ++i) mask[i] = static_cast<uint8_t>(random.bits());
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) store_float(x.data, type, m * x_stride + k, random.uniform() * scale);
  }
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      bool kept = false;
      for (int64_t v = 0; v < V; ++v) kept = kept || (mask[(v * N + n) * row_bytes + k / 8] >> (k % 8) & 1);
      const float dropped = std::numeric_limits<float>::quiet_NaN();  // must not count
      store_float(weight.data, type, n * weight_stride + k, kept ? random.uniform() : dropped);
    }
    bias[n] = random.uniform();
  }
  const MaskedLinear args = {type,
                             x.data,
                             x_stride,
                             weight.data,
                             weight_stride,
                             mask.data(),
                             row_bytes,
                             N * row_bytes,
                             with_bias ? bias.data() : nullptr,
                             V,
                             M,
                             N,
                             K,
                             y.data};
  masked_linear(isa, args, 2);
  const std::vector<float> plain = products(isa, args);
  for (int64_t v = 0; v < V; ++v) {
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        const int64_t index = (v * M + m) * N + n;
        const float expected = plain[static_cast<size_t>(index)] + (with_bias ? bias[n] : 0.0f);
        if (type == FloatType::kFloat32) {
          CHECK(y.wide[index] == expected);
        } else {
          CHECK(y.narrow[index] == bfloat16_bits(expected));
        }
      }
    }
  }
}

// Pieces cannot hold what is not finite, nor the largest numbers, and too little of the smallest.
void test_extremes_in_pieces(int64_t V, int64_t M) {
  constexpr int64_t N = 35, K = 300, kRowBytes = (K + 7) / 8;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Random random(static_cast<uint64_t>(100 * V + M));
  GuardedBuffer<float> x(M * K), weight(N * K), y(V * M * N);
  GuardedBuffer<uint8_t> mask(V * N * kRowBytes);
  for (int64_t i = 0; i < M * K; ++i) x[i] = random.uniform();
  for (int64_t i = 0; i < N * K; ++i) weight[i] = random.uniform();
  for (int64_t i = 0; i < V * N * kRowBytes; ++i) mask[i] = static_cast<uint8_t>(random.bits() | 1);
  const float extremes[] = {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(), 0x1.fffffep127f,
                            0x1p-130f};
  for (int64_t m = 0; m < M; m += 3) x[m * K + 8 * (m % 37)] = extremes[m / 3 % 5];
  for (int64_t k = 0; k < K; ++k) x[(M - 1) * K + k] *= 0x1p-100f;
  weight[2 * K] = kInfinity;
  weight[7 * K + 8] = 0x1.fffffep127f;
  weight[33 * K + 16] = std::numeric_limits<float>::quiet_NaN();
  const MaskedLinear args = {FloatType::kFloat32,
                             x.data(),
                             K,
                             weight.data(),
                             K,
                             mask.data(),
                             kRowBytes,
                             N * kRowBytes,
                             nullptr,
                             V,
                             M,
                             N,
                             K,
                             y.data()};
  masked_linear(CpuIsa::kAmx, args, 2);
  const std::vector<float> expected = products(CpuIsa::kAmx, args);
  for (int64_t i = 0; i < V * M * N; ++i) {
    const float wanted = expected[static_cast<size_t>(i)];
    CHECK(y[i] == wanted || (std::isnan(y[i]) && std::isnan(wanted)));
  }
}

// A machine uses one way of fetching; all of them must give the same bits. The rows lie without gaps, as runs
// need them.
void test_fetches(CpuIsa isa, FloatType type, int64_t V, int64_t M) {
  constexpr int64_t N = 41, K = 1100, kRowBytes = (K + 7) / 8;
  const bool pairs = isa == CpuIsa::kAvx512Bf16 && type == FloatType::kBfloat16;
  Random random(static_cast<uint64_t>(100 * V + M));
  Matrix x(type, M * K), weight(type, N * K);
  GuardedBuffer<uint8_t> mask(V * N * kRowBytes);
  for (int64_t i = 0; i < M * K; ++i) store_float(x.data, type, i, random.uniform());
  for (int64_t i = 0; i < N * K; ++i) store_float(weight.data, type, i, random.uniform());
  for (int64_t i = 0; i < V * N * kRowBytes; ++i) mask[i] = static_cast<uint8_t>(random.bits());
  const MaskedLinear args = {type,          x.data,  K, weight.data, K, mask.data(), kRowBytes,
                             N * kRowBytes, nullptr, V, M,           N, K,           nullptr};
  std::vector<float> packed(static_cast<size_t>(few_tokens_x_size(M, K)));
  std::vector<float> scratch(static_cast<size_t>(few_tokens_scratch(V)) + 16);
  GuardedBuffer<float> c(V * M * N);
  (pairs ? few_tokens_x_avx512_bf16 : few_tokens_x_avx512)(type, x.data, K, M, K, packed.data());
  void* aligned = scratch.data();
  size_t space = scratch.size() * sizeof(float);
  std::align(64, static_cast<size_t>(few_tokens_scratch(V)) * sizeof(float), aligned, space);
  const std::vector<float> expected = products(isa, args);
  for (Fetch fetch : {Fetch::kNextVectors, Fetch::kRunsToFirstLevel, Fetch::kRunsToSecondLevel}) {
    for (int64_t i = 0; i < V * M * N; ++i) c[i] = std::numeric_limits<float>::quiet_NaN();
    (pairs ? masked_few_tokens_avx512_bf16 : masked_few_tokens_avx512)(
        {type, x.data, K, weight.data, K, mask.data(), kRowBytes, N * kRowBytes, V, M, N, K, c.data(), N,
         M * N, static_cast<float*>(aligned)},
        packed.data(), fetch);
    for (int64_t i = 0; i < V * M * N; ++i) CHECK(c[i] == expected[static_cast<size_t>(i)]);
  }
}

}  // namespace

int main() {
  for_each_isa([](CpuIsa isa) {
    if (isa == CpuIsa::kAvx512Vnni) return;  // the kernels of AVX-512
    for (FloatType type : {FloatType::kFloat32, FloatType::kBfloat16}) {
      // The kernel of AVX-512, whose ways of fetching test_fetches compares.
      if (type == FloatType::kFloat32 && isa > CpuIsa::kAvx512 && isa != CpuIsa::kAmx) continue;
      for (int64_t K : {0, 1, 7, 8, 9, 16, 17, 31, 255, 256, 257, 300}) {
        for (int64_t M : {0, 1, 5, 12, 16, 33}) {
          for (int64_t N : {0, 1, 15, 33, 70}) {
            test_shape(isa, type, {1, M, N, K}, true);
            test_shape(isa, type, {2, M, N, K}, false);
          }
        }
      }
      test_shape(isa, type, {0, 3, 4, 5}, true);
      test_shape(isa, type, {1, 40, 33, 601}, true);  // several blocks of K, more than one group of rows
      test_shape(isa, type, {9, 33, 70, 600}, false);
      test_shape(isa, type, {1, 600, 40, 350}, true);
      test_shape(isa, type, {3, 3, 35, 4133}, true);  // few rows of x: several runs of K
      test_shape(isa, type, {2, 32, 33, 4097}, false);
      test_shape(isa, type, {1, 20, 40, 90}, false, 0x1p-126f);  // denormal x
      test_shape(isa, type, {11, 13, 35, 40}, true);
      test_shape(isa, type, {1, 245, 66, 40}, false);
      test_shape(isa, type, {1, 35, 1024, 300}, true);  // rows of float32 a page apart
      for (int64_t M : {1, 4, 8, 9, 20}) {
        for (int64_t V : {1, 3, 9}) {
          if (isa >= CpuIsa::kAvx512 && isa != CpuIsa::kAmx) test_fetches(isa, type, V, M);
        }
      }
      if (isa == CpuIsa::kAmx && type == FloatType::kFloat32) {
        for (int64_t V : {1, 3}) {
          for (int64_t M : {1, 16, 17, 75}) test_extremes_in_pieces(V, M);
        }
        test_shape(isa, type, {2, 530, 70, 259}, true);  // two tiles of rows
        for (int64_t K : {1024, 1025, 1160, 2200}) {     // one eight of blocks, and more
          for (int64_t M : {1, 20, 70}) test_shape(isa, type, {2, M, 40, K}, true);
        }
        test_shape(isa, type, {1, 60, 70, 300}, false, 0x1p-70f);
      }
      if (isa != CpuIsa::kAmx) continue;
      // Few rows of x under several masks: in passes of 2 to 4.
      for (int64_t V : {4, 5, 7, 8}) test_shape(isa, type, {V, 3, 35, 360}, true);
      // The weight is packed: several blocks of K, tails of each size, tasks of one block of rows more or
      // less.
      test_shape(isa, type, {1, 512, 33, 1}, false);
      test_shape(isa, type, {2, 1061, 70, 353}, true);
      test_shape(isa, type, {1, 800, 16, 640}, true, 0x1p-126f);
    }
  });
}
