// bitmap_linear on a GPU, against sums in double on the CPU.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "../kernels/cuda/bitmap_linear.h"
#include "cuda_check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

long long wide(int64_t value) { return static_cast<long long>(value); }

// The format, as dtm_fast/ops/bitmap_weight.py describes it; weight [N, K] with NaN where nothing is kept.
struct Packed {
  std::vector<uint32_t> bits;
  std::vector<int64_t> begins;
  std::vector<uint16_t> values;
};

Packed pack(const std::vector<float>& weight, int64_t N, int64_t K) {
  Packed packed;
  packed.begins.push_back(0);
  for (int64_t n0 = 0; n0 < N; n0 += 16) {
    for (int64_t k0 = 0; k0 < K; k0 += 128) {
      uint32_t bits[32][2] = {};
      for (int mma = 0; mma < 8; ++mma) {
        for (int lane = 0; lane < 32; ++lane) {
          std::vector<uint16_t> halves[2];
          for (int element = 0; element < 8; ++element) {
            const int64_t n = n0 + lane / 4 + 8 * (element / 2 % 2);
            const int64_t k =
                k0 + 32 * (mma / 2) + 8 * (lane % 4) + 4 * (mma % 2) + 2 * (element / 4) + element % 2;
            if (n >= N || k >= K || std::isnan(weight[n * K + k])) continue;
            bits[lane][mma / 4] |= 1u << (4 * element + mma % 4);
            halves[element / 4].push_back(from_float<uint16_t>(weight[n * K + k]));
          }
          packed.values.insert(packed.values.end(), halves[0].begin(), halves[0].end());
          packed.values.resize(packed.values.size() + (halves[0].size() + halves[1].size()) % 2);
          packed.values.insert(packed.values.end(), halves[1].rbegin(), halves[1].rend());
        }
      }
      for (const auto& words : bits) packed.bits.insert(packed.bits.end(), words, words + 2);
      packed.values.resize((packed.values.size() + 7) / 8 * 8);
      packed.begins.push_back(static_cast<int64_t>(packed.values.size()));
    }
  }
  return packed;
}

struct Case {
  int64_t M, N, K;
  float density;
  bool aligned, with_bias;
};

void check(Random& random, cudaStream_t stream, const Case& size) {
  if (left_out()) return;
  const auto [M, N, K, density, aligned, with_bias] = size;
  std::vector<float> weight(static_cast<size_t>(N * K));
  for (auto& each : weight) {
    const bool kept = (random.uniform() + 1) / 2 < density;
    each = kept ? to_float(from_float<uint16_t>(random.uniform())) : NAN;
  }
  const Packed packed = pack(weight, N, K);
  const int64_t x_stride = aligned ? (K + 7) / 8 * 8 : K + 3, offset = aligned ? 0 : 1;
  std::vector<uint16_t> rows(static_cast<size_t>(M == 0 ? 0 : (M - 1) * x_stride + K), uint16_t{0xffff});
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k) rows[m * x_stride + k] = from_float<uint16_t>(random.uniform());
  std::vector<float> bias_values(static_cast<size_t>(N));
  for (auto& each : bias_values) each = random.uniform();

  const DeviceBuffer<uint16_t> x(rows, offset), values(packed.values), y(M * N, offset), first(M > 0 ? N : 0);
  const DeviceBuffer<uint32_t> bits(packed.bits);
  const DeviceBuffer<int64_t> begins(packed.begins);
  const DeviceBuffer<float> bias(bias_values);
  BitmapLinear args = {FloatType::kBfloat16,
                       x.data(),
                       x_stride,
                       bits.data(),
                       begins.data(),
                       values.data(),
                       with_bias ? bias.data() : nullptr,
                       M,
                       N,
                       K,
                       y.data()};
  bitmap_linear_cuda(args, stream);
  const std::vector<uint16_t> found = y.host();
  int64_t wrong = 0;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = with_bias ? bias_values[n] : 0, size_of_terms = std::fabs(sum);
      for (int64_t k = 0; k < K; ++k) {
        if (std::isnan(weight[n * K + k])) continue;
        const double product = double{weight[n * K + k]} * to_float(rows[m * x_stride + k]);
        sum += product;
        size_of_terms += std::fabs(product);
      }
      // Half a unit in the last place of bfloat16, and float32 sums.
      const double allowed = std::fabs(sum) * 0x1.02p-8 + size_of_terms * 0x1p-18 + 1e-30;
      wrong += !(std::fabs(to_float(found[m * N + n]) - sum) <= allowed);
    }
  }
  expect(wrong == 0, "bitmap_linear: M = %lld, N = %lld, K = %lld, density %g, %saligned: %lld wrong",
         wide(M), wide(N), wide(K), density, aligned ? "" : "un", wide(wrong));

  if (M == 0) return;
  args.M = 1;
  args.y = first.data();
  bitmap_linear_cuda(args, stream);
  const std::vector<uint16_t> alone = first.host();
  expect(std::equal(alone.begin(), alone.end(), found.begin()),
         "bitmap_linear: M = %lld, N = %lld, K = %lld: the first row depends on the others", wide(M), wide(N),
         wide(K));
}

bool refuses(BitmapLinear args) {
  try {
    bitmap_linear_cuda(args, nullptr);
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  Random random(1);
  {
    const Stream stream;
    size_t turn = 0;
    const std::vector<int64_t> rows = {1, 15, 16, 17, 64, 130, 513};
    const std::vector<float> densities = {0.25f, 0.5f, 1.0f, 0.02f, 0.0f};
    for (int64_t M : {1, 2, 7, 8, 9, 16}) {
      for (int64_t K : {0, 1, 16, 63, 64, 65, 123, 128, 512, 1040, 2400, 4100}) {
        for (int times = 0; times < 2; ++times, ++turn)
          check(random, stream,
                {M, rows[turn % rows.size()], K, densities[turn % densities.size()], times == 0,
                 turn % 3 != 0});
      }
    }
    // So many columns that every warp goes around its stages several times.
    check(random, stream, {16, 33, 11008, 0.5f, true, true});
    check(random, stream, {3, 16, 13824, 0.25f, true, false});
    // So many rows that a block has several strips, also where it takes K in chunks.
    check(random, stream, {16, 4500, 640, 0.25f, true, true});
    check(random, stream, {9, 7001, 4300, 0.5f, false, true});
    check(random, stream, {0, 64, 64, 0.5f, true, true});
    check(random, stream, {4, 0, 64, 0.5f, true, true});
    expect(refuses({FloatType::kFloat32, nullptr, 8, nullptr, nullptr, nullptr, nullptr, 1, 1, 8, nullptr}),
           "bitmap_linear: float32 is not refused");
    expect(refuses({FloatType::kBfloat16, nullptr, 8, nullptr, nullptr, nullptr, nullptr, 17, 1, 8, nullptr}),
           "bitmap_linear: 17 rows are not refused");
  }
  return finish();
}
