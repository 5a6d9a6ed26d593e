// Decoder layers with random weights, sequences for them, and the twin of decoder_layer: the same in scalar
// double precision.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <list>
#include <vector>

#include "../kernels/cpu/decoder_layer.h"
#include "../kernels/cpu/store_float.h"
#include "check.h"

namespace dtm_fast::test {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct LayerSizes {
  int64_t hidden, heads, kv_heads, head_dim, intermediate;
  bool has_bias, has_head_norms;
  bool is_fused;  // one projection each for queries, keys and values, and for gate and up

  int64_t q_cols() const { return heads * head_dim; }
  int64_t kv_cols() const { return kv_heads * head_dim; }
  int64_t qkv_cols() const { return q_cols() + 2 * kv_cols(); }
};

// y = x @ weight.T + bias; the bias is empty if there is none.
struct Linear {
  int64_t N, K;
  std::vector<float> weight, bias;
};

inline double rounded_to_bfloat16(double value) {
  return double{float_from_bfloat16(bfloat16_bits(static_cast<float>(value)))};
}
inline double not_rounded(double value) { return value; }

// Weights that keep states near 1, numbers of bfloat16 if asked for.
struct LayerWeights {
  LayerWeights(const LayerSizes& of, int64_t positions, bool is_bfloat16, uint64_t seed) : sizes(of) {
    Random random(seed);
    const auto vector = [&](int64_t count, float middle, float spread) {
      std::vector<float> values(static_cast<size_t>(count));
      for (float& each : values) {
        each = middle + spread * random.uniform();
        if (is_bfloat16) each = static_cast<float>(rounded_to_bfloat16(double{each}));
      }
      return values;
    };
    const auto linear = [&](int64_t N, int64_t K) {
      const float spread = std::sqrt(3.0f / static_cast<float>(K));  // the variance of a sum is that of x
      return Linear{N, K, vector(N * K, 0.0f, spread), vector(of.has_bias ? N : 0, 0.0f, 0.5f)};
    };
    attention_norm = vector(of.hidden, 1.0f, 0.5f);
    mlp_norm = vector(of.hidden, 1.0f, 0.5f);
    q_norm = vector(of.has_head_norms ? of.head_dim : 0, 1.0f, 0.5f);
    k_norm = vector(of.has_head_norms ? of.head_dim : 0, 1.0f, 0.5f);
    cosine =
        vector(positions * of.head_dim, 0.0f, 1.0f);  // not those of angles: each one shows where it went
    sine = vector(positions * of.head_dim, 0.0f, 1.0f);
    qkv = linear(of.qkv_cols(), of.hidden);
    attention_out = linear(of.hidden, of.q_cols());
    gate_up = linear(2 * of.intermediate, of.hidden);
    mlp_out = linear(of.hidden, of.intermediate);
    attention_scale = 1.0f / std::sqrt(static_cast<float>(of.head_dim));
  }

  LayerSizes sizes;
  float eps = 1e-5f, attention_scale;
  std::vector<float> attention_norm, mlp_norm, q_norm, k_norm, cosine, sine;
  Linear qkv, attention_out, gate_up, mlp_out;
};

// Weights as the kernels take them, with guards around what is packed. They refer to the vectors of
// `weights`.
class PackedLayer {
 public:
  // kChange: `base` are the weights of the base; what is equal to them has no change.
  PackedLayer(CpuIsa isa, LayerArithmetic arithmetic, const LayerWeights& weights,
              const LayerWeights* base = nullptr)
      : isa_(isa), is_fused_(weights.sizes.is_fused) {
    const LayerSizes& s = weights.sizes;
    layer.arithmetic = arithmetic;
    layer.hidden = s.hidden, layer.heads = s.heads, layer.kv_heads = s.kv_heads;
    layer.head_dim = s.head_dim, layer.intermediate = s.intermediate;
    layer.eps = weights.eps, layer.attention_scale = weights.attention_scale;
    layer.attention_norm = weights.attention_norm.data(), layer.mlp_norm = weights.mlp_norm.data();
    layer.q_norm = s.has_head_norms ? weights.q_norm.data() : nullptr;
    layer.k_norm = s.has_head_norms ? weights.k_norm.data() : nullptr;
    layer.cosine = weights.cosine.data(), layer.sine = weights.sine.data();
    const std::vector<int64_t> qkv = {s.q_cols(), s.kv_cols(), s.kv_cols()};
    const std::vector<int64_t> gate_up = {s.intermediate, s.intermediate};
    layer.attention_ins = pack(weights.qkv, base == nullptr ? nullptr : &base->qkv, qkv, layer.attention_in);
    pack(weights.attention_out, base == nullptr ? nullptr : &base->attention_out, {s.hidden},
         &layer.attention_out);
    layer.mlp_ins = pack(weights.gate_up, base == nullptr ? nullptr : &base->gate_up, gate_up, layer.mlp_in);
    pack(weights.mlp_out, base == nullptr ? nullptr : &base->mlp_out, {s.hidden}, &layer.mlp_out);
  }

  DecoderLayer layer = {};

 private:
  // `columns` of each projection if they are separate ones; how many they are.
  int64_t pack(const Linear& all, const Linear* base, std::vector<int64_t> columns, Projection* to) {
    if (is_fused_) columns = {all.N};
    int64_t first = 0;
    for (int64_t N : columns) {
      const float* weight = all.weight.data() + first * all.K;
      std::vector<float> change(base == nullptr ? 0 : static_cast<size_t>(N * all.K));
      bool differs = false;
      for (size_t i = 0; i < change.size(); ++i) {
        change[i] = weight[i] - base->weight[static_cast<size_t>(first * all.K) + i];
        differs = differs || change[i] != 0.0f;
      }
      *to++ = {pack(weight, N, all.K),
               differs ? pack(change.data(), N, all.K) : nullptr,
               pack_rest(weight, N, all.K),
               differs ? pack_rest(change.data(), N, all.K) : nullptr,
               all.bias.empty() ? nullptr : all.bias.data() + first,
               N,
               first};
      first += N;
    }
    return static_cast<int64_t>(columns.size());
  }
  const float* pack(const float* matrix, int64_t N, int64_t K) {
    packed_.emplace_back(packed_matrix_size(layer.arithmetic, N, K));
    pack_matrix(isa_, layer.arithmetic, matrix, N, K, packed_.back().data(), 1);
    return packed_.back().data();
  }

  const float* pack_rest(const float* matrix, int64_t N, int64_t K) {
    if (layer.arithmetic != LayerArithmetic::kFineChange) return nullptr;
    std::vector<float> rest(matrix, matrix + N * K);
    for (float& each : rest) each -= static_cast<float>(rounded_to_bfloat16(double{each}));
    return pack(rest.data(), N, K);
  }

  CpuIsa isa_;
  bool is_fused_;
  std::list<GuardedBuffer<float>> packed_;
};

// [count, columns], NaN until something is written. They end where a page does behind which nothing can be
// accessed, as AddressSanitizer does not see the masked loads and stores of AVX-512; before them lie
// canaries.
struct Rows {
  Rows(int64_t count, int64_t of_columns)
      : columns(of_columns),
        size_(static_cast<size_t>(count * columns) * sizeof(float)),
        mapped_((size_ + kPage - 1) / kPage * kPage + kPage) {
    void* const pages = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(pages != MAP_FAILED);
    pages_ = static_cast<unsigned char*>(pages);
    CHECK(mprotect(pages_ + mapped_ - kPage, kPage, PROT_NONE) == 0);
    std::fill_n(pages_, before(), kCanary);
    values = reinterpret_cast<float*>(pages_ + before());
    std::fill_n(values, count * columns, kNan);
  }
  ~Rows() {
    CHECK(std::all_of(pages_, pages_ + before(), [](unsigned char each) { return each == kCanary; }));
    munmap(pages_, mapped_);
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  float* at(int64_t row) { return values + row * columns; }

  int64_t columns;
  float* values;

 private:
  static constexpr size_t kPage = 4096;
  static constexpr unsigned char kCanary = 0xa5;
  size_t before() const { return mapped_ - kPage - size_; }

  size_t size_, mapped_;
  unsigned char* pages_;
};

inline bool same_bits(Rows& a, Rows& b, int64_t first, int64_t end) {
  CHECK(a.columns == b.columns);
  return std::memcmp(a.at(first), b.at(first),
                     static_cast<size_t>((end - first) * a.columns) * sizeof(float)) == 0;
}

// Each row's error in units of its norm, or of half of what rows have on average, if that is more: where the
// terms of a row's sums cancel, its norm says little of what was rounded.
template <typename Number>
void check_close(const float* found, const Number* expected, int64_t rows, int64_t columns,
                 double tolerance) {
  const auto squares = [](int64_t begin, int64_t end, const auto& value) {
    double sum = 0.0;
    for (int64_t i = begin; i < end; ++i) sum += std::pow(value(i), 2);
    return sum;
  };
  const auto wanted = [&](int64_t i) { return double{expected[i]}; };
  const auto off = [&](int64_t i) { return double{found[i]} - double{expected[i]}; };
  const double least = rows == 0 ? 0.0 : squares(0, rows * columns, wanted) / static_cast<double>(rows) / 4.0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row * columns, end = begin + columns;
    const double norm = std::max(squares(begin, end, wanted), least);
    CHECK(std::sqrt(squares(begin, end, off)) <= tolerance * std::sqrt(norm));
  }
}

// A sequence: its input, and room for all that a layer writes.
struct Sequence {
  Sequence(const LayerSizes& s, int64_t of_length, bool is_bfloat16, uint64_t seed)
      : length(of_length),
        in(length, s.hidden),
        out(length, s.hidden),
        kv(length, 2 * s.kv_cols()),
        qkv(length, s.qkv_cols()),
        attention(length, s.q_cols()),
        mid(length, s.hidden),
        gate_up(length, 2 * s.intermediate) {
    Random random(seed);
    for (int64_t i = 0; i < length * s.hidden; ++i) {
      const float value = 2.0f * random.uniform();
      in.values[i] = is_bfloat16 ? static_cast<float>(rounded_to_bfloat16(double{value})) : value;
    }
  }

  LayerStates states(int64_t first) {
    return {in.at(first), qkv.at(first), attention.at(first), mid.at(first), gate_up.at(first)};
  }
  SequencePart part(int64_t first, int64_t count, bool keeps = false) {
    LayerStates keep = {};
    if (keeps) keep = states(first), keep.in = nullptr;
    return {first, count, 0, in.at(first), out.at(first), kv.at(0), {}, keep};
  }
  // kChange: against the states of `base`, from the difference of the inputs if there is one.
  SequencePart change(Sequence& base, int64_t first, int64_t count, bool has_in) {
    SequencePart changed = part(first, count);
    changed.base = base.states(first);
    if (!has_in) changed.in = nullptr;
    return changed;
  }

  int64_t length;
  Rows in, out, kv, qkv, attention, mid, gate_up;
};

// What a layer computes of a whole sequence: each [length, columns].
struct TwinStates {
  std::vector<double> qkv, kv, attention, mid, gate_up, out;
};

class Twin {
 public:
  // stored: what happens to a number where Hugging Face stores it
  Twin(const LayerWeights& weights, double (*stored)(double)) : w_(weights), stored_(stored) {}

  TwinStates run(const float* in, int64_t length) const {
    const LayerSizes& s = w_.sizes;
    const std::vector<double> x(in, in + length * s.hidden);
    TwinStates states;
    states.qkv = product(w_.qkv, normed(x, w_.attention_norm, s.hidden));
    std::vector<double> queries = columns(states.qkv, s.qkv_cols(), 0, s.q_cols());
    std::vector<double> keys = columns(states.qkv, s.qkv_cols(), s.q_cols(), s.kv_cols());
    const std::vector<double> values =
        columns(states.qkv, s.qkv_cols(), s.q_cols() + s.kv_cols(), s.kv_cols());
    if (s.has_head_norms) {
      queries = normed(queries, w_.q_norm, s.head_dim);
      keys = normed(keys, w_.k_norm, s.head_dim);
    }
    queries = rotated(queries, s.heads);
    keys = rotated(keys, s.kv_heads);
    for (int64_t t = 0; t < length; ++t) {
      for (const std::vector<double>* each : {static_cast<const std::vector<double>*>(&keys), &values}) {
        const double* row = each->data() + t * s.kv_cols();
        states.kv.insert(states.kv.end(), row, row + s.kv_cols());
      }
    }
    states.attention = attention(queries, keys, values, length);
    states.mid = sum(x, product(w_.attention_out, states.attention));
    states.gate_up = product(w_.gate_up, normed(states.mid, w_.mlp_norm, s.hidden));
    std::vector<double> gated(static_cast<size_t>(length * s.intermediate));
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t j = 0; j < s.intermediate; ++j) {
        const double* gate = states.gate_up.data() + 2 * t * s.intermediate + j;
        const double silu = stored_(gate[0] / (1.0 + std::exp(-gate[0])));
        gated[static_cast<size_t>(t * s.intermediate + j)] = stored_(silu * gate[s.intermediate]);
      }
    }
    states.out = sum(states.mid, product(w_.mlp_out, gated));
    return states;
  }

 private:
  std::vector<double> product(const Linear& linear, const std::vector<double>& x) const {
    std::vector<double> y;
    for (const double* row = x.data(); row < x.data() + x.size(); row += linear.K) {
      for (int64_t n = 0; n < linear.N; ++n) {
        const float* weight = linear.weight.data() + n * linear.K;
        double total = linear.bias.empty() ? 0.0 : double{linear.bias[static_cast<size_t>(n)]};
        for (int64_t k = 0; k < linear.K; ++k) total += row[k] * double{weight[k]};
        y.push_back(stored_(total));
      }
    }
    return y;
  }

  // Each `depth` numbers by the root of their mean square, times the norm's weight.
  std::vector<double> normed(const std::vector<double>& x, const std::vector<float>& norm,
                             int64_t depth) const {
    std::vector<double> y;
    for (const double* row = x.data(); row < x.data() + x.size(); row += depth) {
      double squares = 0.0;
      for (int64_t k = 0; k < depth; ++k) squares += row[k] * row[k];
      const double rms = std::sqrt(squares / static_cast<double>(depth) + double{w_.eps});
      for (int64_t k = 0; k < depth; ++k) {
        y.push_back(stored_(stored_(row[k] / rms) * double{norm[static_cast<size_t>(k)]}));
      }
    }
    return y;
  }

  std::vector<double> rotated(const std::vector<double>& x, int64_t heads) const {
    const int64_t E = w_.sizes.head_dim, half = E / 2;
    std::vector<double> y(x.size());
    for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
      const int64_t e = i % E, angle = i / (heads * E) * E + e;
      const double other = e < half ? -x[static_cast<size_t>(i + half)] : x[static_cast<size_t>(i - half)];
      y[static_cast<size_t>(i)] =
          stored_(stored_(x[static_cast<size_t>(i)] * double{w_.cosine[static_cast<size_t>(angle)]}) +
                  stored_(other * double{w_.sine[static_cast<size_t>(angle)]}));
    }
    return y;
  }

  std::vector<double> attention(const std::vector<double>& queries, const std::vector<double>& keys,
                                const std::vector<double>& values, int64_t length) const {
    const LayerSizes& s = w_.sizes;
    const int64_t E = s.head_dim;
    std::vector<double> out, weights;
    for (int64_t i = 0; i < length * s.heads; ++i) {
      const int64_t t = i / s.heads, g = i % s.heads * s.kv_heads / s.heads;
      weights.clear();
      for (int64_t key = 0; key <= t; ++key) {
        double score = 0.0;
        for (int64_t e = 0; e < E; ++e) {
          score += queries[static_cast<size_t>(i * E + e)] *
                   keys[static_cast<size_t>(key * s.kv_cols() + g * E + e)];
        }
        weights.push_back(score * double{w_.attention_scale});
      }
      const double largest = *std::max_element(weights.begin(), weights.end());
      double total = 0.0;
      for (double& each : weights) total += each = std::exp(each - largest);
      for (int64_t e = 0; e < E; ++e) {
        double value = 0.0;
        for (int64_t key = 0; key <= t; ++key) {
          value += stored_(weights[static_cast<size_t>(key)]) *
                   values[static_cast<size_t>(key * s.kv_cols() + g * E + e)];
        }
        out.push_back(stored_(value / total));
      }
    }
    return out;
  }

  std::vector<double> sum(const std::vector<double>& a, const std::vector<double>& b) const {
    std::vector<double> y(a.size());
    for (size_t i = 0; i < a.size(); ++i) y[i] = stored_(a[i] + b[i]);
    return y;
  }

  static std::vector<double> columns(const std::vector<double>& x, int64_t stride, int64_t first,
                                     int64_t count) {
    std::vector<double> y;
    for (auto row = x.begin(); row < x.end(); row += stride) {
      y.insert(y.end(), row + first, row + first + count);
    }
    return y;
  }

  const LayerWeights& w_;
  double (*stored_)(double);
};

}  // namespace dtm_fast::test
