// The kernel of decoder_layer.h: neighbouring parts of sequences, from end to end. Included only by files
// compiled for at least AVX-512; everything is in an anonymous namespace, so that no copy can reach a file of
// a lower instruction set.
#pragma once

#include "causal_attention_avx512.h"

namespace dtm_fast {
namespace {

// Columns of gate and up at a time: with the rows of a chunk, they stay in the second-level cache.
constexpr int64_t kGateCols = 128;

// The order of things: states of all rows that the second half needs of the first are its attention alone, so
// that half goes through few rows at a time. A product's result starts as the bias, or for kChange as what
// the base has there.
template <typename Rows, LayerArithmetic kArithmetic>
class LayerTask {
 public:
  LayerTask(const DecoderLayer& layer, const SequencePart* parts, int64_t count, float* scratch)
      : layer_(layer), parts_(parts), count_(count), next_(scratch) {
    for (int64_t p = 0; p < count; ++p) {
      rows_ += parts[p].count;
      const int64_t context = parts[p].first + parts[p].count;
      context_ = context > context_ ? context : context_;
    }
    row_part_ = reinterpret_cast<int32_t*>(take(rows_));
    row_index_ = reinterpret_cast<int32_t*>(take(rows_));
    int64_t row = 0;
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t i = 0; i < parts[p].count; ++i, ++row) {
        row_part_[row] = static_cast<int32_t>(p);
        row_index_[row] = static_cast<int32_t>(i);
      }
    }
  }

  static int64_t scratch_size(const DecoderLayer& layer, int64_t rows, int64_t context) {
    const int64_t attention = AttentionHead::size(layer.head_dim, context);
    const int64_t first_half = 2 * Rows::size(rows, layer.hidden) + rows * layer.qkv_cols();
    const int64_t chunk = rows < Rows::kChunkRows ? rows : Rows::kChunkRows;
    const int64_t widest = layer.hidden > layer.q_cols() ? layer.hidden : layer.q_cols();
    const int64_t second_half = 2 * Rows::size(chunk, widest) + 2 * Rows::size(chunk, layer.intermediate) +
                                chunk * (2 * layer.hidden + 2 * kGateCols);
    const int64_t larger = first_half > second_half ? first_half : second_half;
    return 2 * (rows + 16) + (rows + 16) * layer.q_cols() + attention + larger + 16 * kAllocations;
  }

  void run() {
    attention_ = take(rows_ * layer_.q_cols());
    AttentionHead head(take(AttentionHead::size(layer_.head_dim, context_)), layer_.head_dim, context_);
    float* const rest = next_;
    if (layer_.start == LayerStart::kAttention) {
      project_in();
      for (int64_t p = 0, row = 0; p < count_; row += parts_[p].count, ++p) attend(head, p, row);
    }
    const int64_t chunks = (rows_ + Rows::kChunkRows - 1) / Rows::kChunkRows;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t row = c * rows_ / chunks, rows = (c + 1) * rows_ / chunks - row;
      next_ = rest;
      if (any_output(row, rows)) finish(row, rows);
    }
  }

 private:
  static constexpr bool kIsChange = kArithmetic == LayerArithmetic::kChange;
  static constexpr int64_t kAllocations = 16;

  float* take(int64_t floats) {
    float* const taken = next_;
    next_ += (floats + 15) / 16 * 16;
    return taken;
  }

  Rows take_rows(int64_t rows, int64_t depth) { return {take(Rows::size(rows, depth)), rows, depth}; }

  const SequencePart& part(int64_t row) const { return parts_[row_part_[row]]; }
  static const float* at(const float* states, int64_t index, int64_t columns) {
    return states == nullptr ? nullptr : states + index * columns;
  }

  // What enters: of parts that have no difference yet, nothing (kChange).
  bool has_input() const { return parts_[0].in != nullptr; }

  static bool any_change(const Projection* projections, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (kIsChange && projections[i].change != nullptr) return true;
    }
    return false;
  }

  // c [rows, cols] += rows' product with the columns skip .. skip + cols - 1 of a projection.
  template <typename Wanted>
  void add(const Projection& projection, int64_t skip, int64_t cols, const Rows& rows, const Rows& base_rows,
           bool has_rows, float* c, int64_t c_stride, const Wanted& wanted) const {
    const int64_t offset = skip * Rows::panel_floats(rows.depth());
    const auto rest = [&](const float* panels) { return panels == nullptr ? nullptr : panels + offset; };
    if (has_rows) {
      add_product(rows, projection.panels + offset, rest(projection.panels_rest), cols, c, c_stride, wanted);
    }
    if (kIsChange && projection.change != nullptr) {
      add_product(base_rows, projection.change + offset, rest(projection.change_rest), cols, c, c_stride,
                  wanted);
    }
  }

  static void fill(float* to, const float* from, int64_t count) {
    for (int64_t k = 0; k < count; k += 16) {
      store_vector(to, k, count, from == nullptr ? _mm512_setzero_ps() : load_vector(from, k, count));
    }
  }

  static void round(float* row, int64_t count) {
    if (kArithmetic != LayerArithmetic::kBfloat16) return;
    for (int64_t k = 0; k < count; k += 16) {
      store_vector(row, k, count, stored<kArithmetic>(load_vector(row, k, count)));
    }
  }

  // qkv_ = the projections of the normed input.
  void project_in() {
    const int64_t columns = layer_.qkv_cols(), hidden = layer_.hidden;
    const bool changes = any_change(layer_.attention_in, layer_.attention_ins);
    const Rows x = take_rows(rows_, hidden), base_x = take_rows(changes ? rows_ : 0, hidden);
    qkv_ = take(rows_ * columns);
    const bool has_rows = !kIsChange || has_input();
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t i = row_index_[row];
      if (has_rows || changes) {
        norm_row<kArithmetic>(at(part(row).in, i, hidden), at(part(row).base.in, i, hidden),
                              layer_.attention_norm, layer_.eps, row, x, changes ? &base_x : nullptr);
      }
      if (kIsChange) {
        fill(qkv_ + row * columns, at(part(row).base.qkv, i, columns), columns);
      } else {
        for (int64_t p = 0; p < layer_.attention_ins; ++p) {
          const Projection& projection = layer_.attention_in[p];
          fill(qkv_ + row * columns + projection.first, projection.bias, projection.N);
        }
      }
    }
    for (int64_t p = 0; p < layer_.attention_ins; ++p) {
      const Projection& projection = layer_.attention_in[p];
      const bool keys_or_values = projection.first + projection.N > layer_.q_cols();
      const auto wanted = [&](int64_t b) { return keys_or_values || has_output(x, b, 0); };
      add(projection, 0, projection.N, x, base_x, has_rows, qkv_ + projection.first, columns, wanted);
    }
    for (int64_t row = 0; row < rows_; ++row) {
      round(qkv_ + row * columns, columns);
      float* const keep = part(row).keep.qkv;
      if (keep != nullptr) fill(keep + row_index_[row] * columns, qkv_ + row * columns, columns);
    }
  }

  bool any_output(int64_t row0, int64_t rows) const {
    for (int64_t row = row0; row < row0 + rows; ++row) {
      if (part(row).first + row_index_[row] >= part(row).first_output) return true;
    }
    return false;
  }
  bool has_output(const Rows& rows, int64_t block, int64_t row0) const {
    const int64_t first = rows.first_row(block);
    return any_output(row0 + first, rows.first_row(block + 1) - first);
  }

  // attention_ of a part whose first row is row0.
  void attend(AttentionHead& head, int64_t p, int64_t row0) {
    const SequencePart& part = parts_[p];
    const int64_t E = layer_.head_dim, columns = layer_.qkv_cols(), kv_cols = layer_.kv_cols();
    for (int64_t i = 0; i < part.count; ++i) {
      float* const row = qkv_ + (row0 + i) * columns;
      float* const kv = part.kv + (part.first + i) * 2 * kv_cols;
      const float* cosine = layer_.cosine + (part.first + i) * E;
      const float* sine = layer_.sine + (part.first + i) * E;
      for (int64_t h = 0; h < layer_.heads; ++h) {
        rotate_head<kArithmetic>(row + h * E, E, layer_.q_norm, layer_.eps, cosine, sine);
      }
      fill(kv, row + layer_.q_cols(), 2 * kv_cols);
      for (int64_t h = 0; h < layer_.kv_heads; ++h) {
        rotate_head<kArithmetic>(kv + h * E, E, layer_.k_norm, layer_.eps, cosine, sine);
      }
    }
    const int64_t skipped = part.first_output > part.first ? part.first_output - part.first : 0;
    if (skipped >= part.count) return;
    const int64_t group = layer_.heads / layer_.kv_heads;
    for (int64_t g = 0; g < layer_.kv_heads; ++g) {
      head.load(part.kv + g * E, part.kv + kv_cols + g * E, 2 * kv_cols, part.first + part.count);
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        for_each_row_block(part.count - skipped, [&](int64_t i0, int64_t rows) {
          const int64_t i = skipped + i0;
          head.attend<kArithmetic>(qkv_ + (row0 + i) * columns + h * E, columns, rows, part.first + i,
                                   layer_.attention_scale, attention_ + (row0 + i) * layer_.q_cols() + h * E,
                                   layer_.q_cols());
        });
      }
    }
  }

  // From the attention's last projection to the end, for rows row0 .. row0 + rows - 1.
  void finish(int64_t row0, int64_t rows) {
    const int64_t hidden = layer_.hidden;
    float* const mid = take(rows * hidden);
    float* const out = take(rows * hidden);
    const Rows block = {nullptr, rows, hidden};
    const auto wanted = [&](int64_t b) { return has_output(block, b, row0); };
    if (layer_.start <= LayerStart::kAttentionOut) {
      project_attention(row0, rows, out, wanted);
      for (int64_t i = 0; i < rows; ++i)
        add_residual(row0 + i, part(row0 + i).in, out + i * hidden, mid + i * hidden);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        fill(mid + i * hidden,
             kIsChange ? nullptr : at(part(row0 + i).base.mid, row_index_[row0 + i], hidden), hidden);
      }
    }
    multiply_mlp(row0, rows, mid, out, wanted);
  }

  // sum = what comes in at a residual + what a branch gives
  void add_residual(int64_t row, const float* in, const float* branch, float* sum) const {
    const int64_t hidden = layer_.hidden;
    const float* before = at(in, row_index_[row], hidden);
    for (int64_t k = 0; k < hidden; k += 16) {
      __m512 value = stored<kArithmetic>(load_vector(branch, k, hidden));
      if (before != nullptr)
        value = stored<kArithmetic>(_mm512_add_ps(load_vector(before, k, hidden), value));
      store_vector(sum, k, hidden, value);
    }
    float* const keep = part(row).keep.mid;
    if (keep != nullptr) fill(keep + row_index_[row] * hidden, sum, hidden);
  }

  template <typename Wanted>
  void project_attention(int64_t row0, int64_t rows, float* out, const Wanted& wanted) {
    const int64_t hidden = layer_.hidden, cols = layer_.q_cols();
    const Projection& projection = layer_.attention_out;
    const bool changes = any_change(&projection, 1), own = layer_.start == LayerStart::kAttention;
    float* const before = next_;
    const Rows x = take_rows(rows, cols), base_x = take_rows(changes ? rows : 0, cols);
    for (int64_t i = 0; i < rows; ++i) {
      const SequencePart& of = part(row0 + i);
      const int64_t index = row_index_[row0 + i];
      const float* base = at(of.base.attention, index, cols);
      const float* row = own ? attention_ + (row0 + i) * cols : base;
      if (!kIsChange || own) copy_row(row, kIsChange ? base : nullptr, i, x);
      if (changes) copy_row(base, nullptr, i, base_x);
      if (own && of.keep.attention != nullptr) fill(of.keep.attention + index * cols, row, cols);
      fill(out + i * hidden, kIsChange ? nullptr : projection.bias, hidden);
    }
    add(projection, 0, hidden, x, base_x, !kIsChange || own, out, hidden, wanted);
    next_ = before;
  }

  template <typename Wanted>
  void multiply_mlp(int64_t row0, int64_t rows, const float* mid, float* out, const Wanted& wanted) {
    const int64_t hidden = layer_.hidden, wide = layer_.intermediate;
    const bool changes_in = any_change(layer_.mlp_in, layer_.mlp_ins);
    const bool changes_out = any_change(&layer_.mlp_out, 1);
    const bool own = layer_.start <= LayerStart::kMlp;
    // kChange: nothing differs before a later start.
    const bool has_mid = !kIsChange || layer_.start <= LayerStart::kAttentionOut;
    const Rows x = take_rows(rows, hidden), base_x = take_rows(changes_in ? rows : 0, hidden);
    const Rows h = take_rows(rows, wide), base_h = take_rows(changes_out ? rows : 0, wide);
    for (int64_t i = 0; i < rows && own; ++i) {
      if (!has_mid && !changes_in) break;
      norm_row<kArithmetic>(has_mid ? mid + i * hidden : nullptr,
                            at(part(row0 + i).base.mid, row_index_[row0 + i], hidden), layer_.mlp_norm,
                            layer_.eps, i, x, changes_in ? &base_x : nullptr);
    }
    float* const gate_up = take(rows * 2 * kGateCols);
    for (int64_t j = 0; j < wide; j += kGateCols) {
      const int64_t cols = wide - j < kGateCols ? wide - j : kGateCols;
      if (own) project_gate_up(row0, rows, j, cols, x, base_x, has_mid, gate_up, wanted);
      for (int64_t i = 0; i < rows; ++i)
        gate_row(row0 + i, i, j, cols, own, gate_up, h, changes_out ? &base_h : nullptr);
    }
    for (int64_t i = 0; i < rows; ++i) {
      fill(out + i * hidden, kIsChange ? mid + i * hidden : layer_.mlp_out.bias, hidden);
    }
    add(layer_.mlp_out, 0, hidden, h, base_h, !kIsChange || own, out, hidden, wanted);
    for (int64_t i = 0; i < rows; ++i) {
      float* const to = part(row0 + i).out + row_index_[row0 + i] * hidden;
      for (int64_t k = 0; k < hidden; k += 16) {
        __m512 value = stored<kArithmetic>(load_vector(out + i * hidden, k, hidden));
        if (!kIsChange)
          value = stored<kArithmetic>(_mm512_add_ps(load_vector(mid + i * hidden, k, hidden), value));
        store_vector(to, k, hidden, value);
      }
    }
  }

  // gate_up [rows, 2 * kGateCols] = columns j .. j + cols - 1 of gate and of up
  template <typename Wanted>
  void project_gate_up(int64_t row0, int64_t rows, int64_t j, int64_t cols, const Rows& x, const Rows& base_x,
                       bool has_mid, float* gate_up, const Wanted& wanted) {
    const int64_t wide = layer_.intermediate;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = half * wide + j;
      const Projection* projection = layer_.mlp_in;
      while (column >= projection->first + projection->N) ++projection;
      for (int64_t i = 0; i < rows; ++i) {
        const float* from =
            projection->bias == nullptr ? nullptr : projection->bias + column - projection->first;
        if (kIsChange) {
          from = at(part(row0 + i).base.gate_up, row_index_[row0 + i], 2 * wide) + column;
          fetch_row(reinterpret_cast<const char*>(from + cols), cols * sizeof(float));  // the next columns
        }
        fill(gate_up + (2 * i + half) * kGateCols, from, cols);
      }
      add(*projection, column - projection->first, cols, x, base_x, has_mid, gate_up + half * kGateCols,
          2 * kGateCols, wanted);
      for (int64_t i = 0; i < rows; ++i) {
        float* const row = gate_up + (2 * i + half) * kGateCols;
        round(row, cols);
        float* const keep = part(row0 + i).keep.gate_up;
        if (keep != nullptr) fill(keep + row_index_[row0 + i] * 2 * wide + column, row, cols);
      }
    }
  }

  // Columns j .. j + cols - 1 of row i of h (and of base_h): the gated products, kChange: their difference.
  void gate_row(int64_t row, int64_t i, int64_t j, int64_t cols, bool own, const float* gate_up,
                const Rows& h, const Rows* base_h) const {
    const float* base = at(part(row).base.gate_up, row_index_[row], 2 * layer_.intermediate);
    const float* mine = own ? gate_up + 2 * i * kGateCols : base + j;
    const int64_t to_up = own ? kGateCols : layer_.intermediate;
    for (int64_t k = 0; k < cols; k += 32) {
      const auto product = [&](const float* gate, int64_t up, int64_t at) {
        return gated<kArithmetic>(load_vector(gate, at, cols), load_vector(gate + up, at, cols));
      };
      if (!kIsChange) {
        h.store_32(i, j + k, product(mine, to_up, k), product(mine, to_up, k + 16));
        continue;
      }
      const __m512 low = product(base + j, layer_.intermediate, k);
      const __m512 high = product(base + j, layer_.intermediate, k + 16);
      if (base_h != nullptr) base_h->store_32(i, j + k, low, high);
      if (own) {
        h.store_32(i, j + k, _mm512_sub_ps(product(mine, to_up, k), low),
                   _mm512_sub_ps(product(mine, to_up, k + 16), high));
      }
    }
  }

  const DecoderLayer& layer_;
  const SequencePart* parts_;
  int64_t count_, rows_ = 0, context_ = 0;
  float* next_;
  int32_t *row_part_, *row_index_;
  float *qkv_ = nullptr, *attention_ = nullptr;
};

}  // namespace
}  // namespace dtm_fast
