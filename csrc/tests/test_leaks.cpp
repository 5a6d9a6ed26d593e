// Every kernel that allocates at least 10,000 times, on every instruction set in turn: under ASan, which
// tells how much is allocated, not a byte may be left over; LeakSanitizer looks again at the end for what is
// no longer referred to.
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "../kernels/cpu/apply_mask.h"
#include "../kernels/cpu/decoder_layer.h"
#include "../kernels/cpu/int8_linear.h"
#include "../kernels/cpu/mask_bits.h"
#include "../kernels/cpu/masked_ladder.h"
#include "../kernels/cpu/masked_linear.h"
#include "../kernels/cpu/quantize_int8.h"
#include "../kernels/cpu/sparse_linear.h"
#include "../kernels/cpu/sparse_pack.h"
#include "../kernels/cpu/token_divergence.h"
#include "check.h"

// Of <sanitizer/allocator_interface.h>, which GCC does not ship.
extern "C" size_t __sanitizer_get_current_allocated_bytes();

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

constexpr int64_t kLeastCalls = 10000;

struct Shape {
  int64_t M, N, K;
};
// One row and several; one tile and several; with and without tails; nothing at all.
constexpr Shape kShapes[] = {{1, 5, 17}, {9, 70, 33}, {17, 64, 64}, {3, 300, 8},
                             {0, 3, 9},  {2, 0, 9},   {33, 1, 0}};
constexpr int64_t kMaxM = 33, kMaxN = 300, kMaxK = 64, kVariants = 2;

// Arguments large enough for every shape, of both float types: any bits will do for bfloat16, but no NaN.
struct Arguments {
  Arguments()
      : wide(static_cast<size_t>(kMaxN * kMaxK)),
        narrow(wide.size()),
        bytes(static_cast<size_t>(kVariants * kMaxN * kMaxK)),
        weights(bytes.size()),
        results(static_cast<size_t>(kMaxN * kMaxK)),
        scales(static_cast<size_t>(kMaxN), 0.5f),
        tokens(static_cast<size_t>(kMaxM), 0),
        mismatch(static_cast<size_t>(kMaxM)),
        quantized(static_cast<size_t>(kMaxN * kMaxK)),
        unpacked(quantized.size()) {
    Random random(1);
    for (float& each : wide) each = random.uniform();
    for (uint16_t& each : narrow) each = static_cast<uint16_t>(random.integer(0x3e00, 0x3fff));
    for (uint8_t& each : bytes) each = static_cast<uint8_t>(random.bits());
    for (int8_t& each : weights) each = static_cast<int8_t>(random.integer(-127, 127));
  }
  const void* floats(FloatType type) const {
    return type == FloatType::kFloat32 ? static_cast<const void*>(wide.data()) : narrow.data();
  }

  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  std::vector<uint8_t> bytes;
  std::vector<int8_t> weights;
  std::vector<float> results, scales;
  std::vector<int64_t> tokens;
  std::vector<uint8_t> mismatch;
  std::vector<int8_t> quantized;
  std::vector<uint8_t> unpacked;
};

// Calls call(isa, shape, type, threads), every combination in turn, again and again. The OpenMP runtime keeps
// what the last team of threads needed, so that the memory is looked at where the same combination came last.
template <typename Call>
void check(const char* name, const Call& call) {
  const auto every_combination = [&call] {
    int64_t calls = 0;
    for_each_isa([&](CpuIsa isa) {
      for (const Shape& shape : kShapes) {
        for (FloatType type : {FloatType::kFloat32, FloatType::kBfloat16}) {
          for (int threads : {1, 2}) {
            call(isa, shape, type, threads);
            ++calls;
          }
        }
      }
    });
    return calls;
  };
  int64_t calls = every_combination();
  if (calls == 0) return;  // a machine without any of the instruction sets
  const size_t before = __sanitizer_get_current_allocated_bytes();
  while (calls < kLeastCalls) calls += every_combination();
  const size_t after = __sanitizer_get_current_allocated_bytes();
  if (after != before) {
    std::fprintf(stderr, "%s: %zu bytes allocated before, %zu after %lld calls\n", name, before, after,
                 static_cast<long long>(calls));
    std::exit(1);
  }
}

}  // namespace

int main() {
  Arguments a;
  check("quantize_int8", [&](CpuIsa isa, Shape s, FloatType type, int threads) {
    quantize_int8(isa, {a.floats(type), type, s.K, s.N, s.K, a.quantized.data(), a.results.data()}, threads);
  });
  check("int8_linear", [&](CpuIsa isa, Shape s, FloatType type, int threads) {
    int8_linear(isa,
                {type, a.floats(type), s.K, a.weights.data(), s.K, a.scales.data(), a.scales.data(), s.M, s.N,
                 s.K, a.results.data()},
                threads);
  });
  check("pack_mask", [&](CpuIsa isa, Shape s, FloatType, int threads) {
    pack_mask(isa, {a.bytes.data(), s.K, s.N, s.K, a.unpacked.data(), (s.K + 7) / 8}, threads);
  });
  check("unpack_mask", [&](CpuIsa isa, Shape s, FloatType, int threads) {
    unpack_mask(isa, {a.bytes.data(), (s.K + 7) / 8, s.N, s.K, a.unpacked.data(), s.K}, threads);
  });
  check("apply_mask", [&](CpuIsa isa, Shape s, FloatType type, int threads) {
    apply_mask(isa, {type, a.floats(type), s.K, a.bytes.data(), (s.K + 7) / 8, s.N, s.K, a.results.data()},
               threads);
  });
  check("masked_linear", [&](CpuIsa isa, Shape s, FloatType type, int threads) {
    const int64_t row_bytes = (s.K + 7) / 8;
    masked_linear(isa,
                  {type, a.floats(type), s.K, a.floats(type), s.K, a.bytes.data(), row_bytes, s.N * row_bytes,
                   a.scales.data(), kVariants, s.M, s.N, s.K, a.results.data()},
                  threads);
  });
  // A weight of one panel and one block, with room for all entries of the rows up to a multiple of the lanes.
  std::vector<uint16_t> rows(static_cast<size_t>(kSparseMostPanelRows));
  std::vector<uint8_t> steps(rows.size() / kSparseLanes), columns(rows.size() * kMaxK);
  std::vector<float> values(columns.size());
  check("sparse_pack and sparse_linear", [&](CpuIsa isa, Shape s, FloatType type, int threads) {
    const SparseOrder order = {a.bytes.data(), (s.K + 7) / 8, s.N, s.K, rows.data(), steps.data()};
    sparse_order(order, threads);
    sparse_pack({type, a.floats(type), s.K, order, values.data(), columns.data()}, threads);
    SparseStart starts[2];
    sparse_starts(sparse_layout(s.N, s.K), steps.data(), starts);
    const SparseStart end = s.N == 0 || s.K == 0 ? SparseStart{0, 0} : starts[1];
    sparse_linear(isa,
                  {type,
                   a.floats(type),
                   s.K,
                   {values.data(), end.step, columns.data(), end.word, rows.data(), steps.data(), s.N, s.K},
                   a.scales.data(),
                   s.M,
                   a.results.data()},
                  threads);
  });
  check("masked_ladder", [&](CpuIsa isa, Shape s, FloatType type, int threads) {
    const int64_t row_bytes = (s.K + 7) / 8;  // one mask twice
    masked_ladder(isa,
                  {type, a.floats(type), s.K, a.floats(type), s.K, a.bytes.data(), row_bytes, 0,
                   a.scales.data(), kVariants, s.M, s.N, s.K, a.results.data()},
                  threads);
  });
  check("token_divergence", [&](CpuIsa isa, Shape s, FloatType type, int threads) {
    if (s.N == 0) return;  // a vocabulary has a token
    token_divergence(isa,
                     {type, a.floats(type), s.K, a.floats(type), s.K, a.tokens.data(), s.M, s.N, s.K,
                      a.mismatch.data(), a.results.data()},
                     threads);
  });
  // One arithmetic in float32, two that multiply bfloat16. What an instruction set has no kernel for is
  // refused, and that must leave nothing behind, either.
  const auto for_each_arithmetic = [](FloatType type, const auto& call) {
    const bool is_float32 = type == FloatType::kFloat32;
    for (int each = is_float32 ? 0 : 1; each < (is_float32 ? 1 : 4); ++each) {
      try {
        call(LayerArithmetic(each));
      } catch (const std::invalid_argument&) {
      }
    }
  };
  std::vector<float> panels(
      static_cast<size_t>(packed_matrix_size(LayerArithmetic::kFineChange, kMaxN, kMaxK)), 0.5f);
  check("pack_matrix", [&](CpuIsa isa, Shape s, FloatType type, int threads) {
    for_each_arithmetic(type, [&](LayerArithmetic arithmetic) {
      pack_matrix(isa, arithmetic, a.wide.data(), s.N, s.K, panels.data(), threads);
    });
  });
  // Two sequences through a small layer, the second one behind its first position.
  constexpr int64_t kHidden = 20, kKvCols = 6, kIntermediate = 32;
  std::vector<float> keys_and_values(static_cast<size_t>(2 * kMaxM * 2 * kKvCols));
  check("decoder_layer", [&](CpuIsa isa, Shape s, FloatType type, int threads) {
    for_each_arithmetic(type, [&](LayerArithmetic arithmetic) {
      float* const any = a.wide.data();
      const LayerStates states = {any, any, any, any, any};
      DecoderLayer layer = {};
      layer.arithmetic = arithmetic;
      layer.hidden = kHidden, layer.heads = 2, layer.kv_heads = 1, layer.head_dim = kKvCols;
      layer.intermediate = kIntermediate, layer.eps = 1e-5f, layer.attention_scale = 0.5f;
      layer.attention_norm = layer.mlp_norm = layer.cosine = layer.sine = any;
      layer.attention_in[0] = {
          panels.data(), panels.data(), panels.data(), panels.data(), any, 4 * kKvCols, 0};
      layer.attention_out =
          layer.mlp_out = {panels.data(), panels.data(), panels.data(), panels.data(), any, kHidden, 0};
      layer.mlp_in[0] = {panels.data(), nullptr, panels.data(), nullptr, any, 2 * kIntermediate, 0};
      layer.attention_ins = layer.mlp_ins = 1;
      float* const out = a.results.data();
      float* const kv = keys_and_values.data();
      const SequencePart parts[] = {
          {0, s.M, 0, any, out, kv, states, {}},
          {1, 1, 0, any, out + kMaxM * kHidden, kv + kMaxM * 2 * kKvCols, states, {}}};
      decoder_layer(isa, layer, parts, 2, threads);
    });
  });
}
