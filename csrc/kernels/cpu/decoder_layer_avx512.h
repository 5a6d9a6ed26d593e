// The kernel of decoder_layer.h: neighbouring parts of sequences, from end to end. Included only by files
// compiled for at least AVX-512; everything is in an anonymous namespace, so that no copy can reach a file of
// a lower instruction set.
#pragma once

#include <type_traits>

#include "causal_attention_avx512.h"

namespace dtm_fast {
namespace {

// Columns of gate and up at a time: with the rows of a chunk, they stay in the second-level cache.
constexpr int64_t kGateCols = 128;
// States are asked for so many rows before they are read: rows are too far apart for the machine to foresee
// the next ones. Of gate and up, which are most of them, 2 to 8 take the same time.
constexpr int64_t kRowsAhead = 4;

// The order of things: states of all rows that the second half needs of the first are its attention alone, so
// that half goes through few rows at a time. To a product is added what comes before it: the bias, or for
// kChange what the base has there.
template <typename Rows, LayerArithmetic kArithmetic>
class LayerTask {
  // What is not rounded to bfloat16 is multiplied in float32.
  using Head = AttentionHead<
      std::conditional_t<kArithmetic == LayerArithmetic::kBfloat16, Rows, PackedRows<FloatLanes>>>;

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
    const int64_t attention = Head::size(layer.head_dim, context);
    const int64_t first_half =
        2 * Rows::size(rows, layer.hidden) + Rows::written_rows(rows) * layer.qkv_cols();
    const int64_t chunk = rows < Rows::kChunkRows ? rows : Rows::kChunkRows;
    const int64_t widest = layer.intermediate > layer.q_cols() ? layer.intermediate : layer.q_cols();
    const int64_t second_half = 2 * Rows::size(chunk, layer.hidden) + 2 * Rows::size(chunk, widest) +
                                Rows::written_rows(chunk) * (layer.hidden + 2 * kGateCols);
    const int64_t larger = first_half > second_half ? first_half : second_half;
    return 2 * (rows + 16) + attention_rows(rows) * layer.q_cols() + attention + larger + 16 * kAllocations;
  }

  void run() {
    attention_ = take(attention_rows(rows_) * layer_.q_cols());
    Head head(take(Head::size(layer_.head_dim, context_)), layer_.head_dim, context_);
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
  float* take_result(int64_t rows, int64_t cols) { return take(Rows::written_rows(rows) * cols); }
  // What the attention of so many rows needs: its products begin at any of them, and each may write behind
  // its last one.
  static int64_t attention_rows(int64_t rows) { return rows + Rows::written_rows(1); }

  const SequencePart& part(int64_t row) const { return parts_[row_part_[row]]; }
  static const float* at(const float* states, int64_t index, int64_t columns) {
    return states == nullptr ? nullptr : states + index * columns;
  }

  // Asks for `count` columns of a state, kRowsAhead rows after this one.
  static void fetch_ahead(const float* row, int64_t columns, int64_t count) {
    if (row == nullptr) return;
    fetch_row(reinterpret_cast<const char*>(row + kRowsAhead * columns),
              count * static_cast<int64_t>(sizeof(float)));
  }

  // What enters: of parts that have no difference yet, nothing (kChange).
  bool has_input() const { return parts_[0].in != nullptr; }

  static bool any_change(const Projection* projections, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (kIsChange && projections[i].change != nullptr) return true;
    }
    return false;
  }

  // c [rows, cols] = or += rows' product with the columns skip .. skip + cols - 1 of a projection, kChange:
  // and the base's with their change
  template <typename Wanted>
  void multiply(const Projection& projection, int64_t skip, int64_t cols, const Rows& rows,
                const Rows& base_rows, bool has_rows, float* c, int64_t c_stride, const Wanted& wanted,
                bool adds = false) const {
    const int64_t offset = skip * Rows::panel_floats(rows.depth());
    const auto rest = [&](const float* panels) { return panels == nullptr ? nullptr : panels + offset; };
    const bool changes = any_change(&projection, 1);
    if (has_rows) {
      multiply_rows(rows, projection.panels + offset, rest(projection.panels_rest), cols, adds, c, c_stride,
                    wanted);
    }
    if (changes) {
      multiply_rows(base_rows, projection.change + offset, rest(projection.change_rest), cols,
                    adds || has_rows, c, c_stride, wanted);
    }
    if (!has_rows && !changes && !adds) {
      for (int64_t i = 0; i < rows.count(); ++i) fill(c + i * c_stride, nullptr, cols);
    }
  }

  static void fill(float* to, const float* from, int64_t count) {
    for (int64_t k = 0; k < count; k += 16) {
      store_vector(to, k, count, from == nullptr ? _mm512_setzero_ps() : load_vector(from, k, count));
    }
  }

  // A product's row with what comes before it, if there is anything.
  static void complete(const float* before, float* row, int64_t count) {
    if (before == nullptr && kArithmetic != LayerArithmetic::kBfloat16) return;
    for (int64_t k = 0; k < count; k += 16) {
      __m512 value = load_vector(row, k, count);
      if (before != nullptr) value = _mm512_add_ps(load_vector(before, k, count), value);
      store_vector(row, k, count, stored<kArithmetic>(value));
    }
  }

  // qkv_ = the projections of the normed input.
  void project_in() {
    const int64_t columns = layer_.qkv_cols(), hidden = layer_.hidden;
    const bool changes = any_change(layer_.attention_in, layer_.attention_ins);
    const Rows x = take_rows(rows_, hidden), base_x = take_rows(changes ? rows_ : 0, hidden);
    qkv_ = take_result(rows_, columns);
    const bool has_rows = !kIsChange || has_input();
    for (int64_t row = 0; row < rows_ && (has_rows || changes); ++row) {
      const float* const in = at(part(row).in, row_index_[row], hidden);
      const float* const base = at(part(row).base.in, row_index_[row], hidden);
      fetch_ahead(in, hidden, hidden);
      fetch_ahead(base, hidden, hidden);
      norm_row<kArithmetic>(in, base, layer_.attention_norm, layer_.eps, row, x, changes ? &base_x : nullptr);
    }
    for (int64_t p = 0; p < layer_.attention_ins; ++p) {
      const Projection& projection = layer_.attention_in[p];
      const bool keys_or_values = projection.first + projection.N > layer_.q_cols();
      const auto wanted = [&](int64_t b) { return keys_or_values || has_output(x, b, 0); };
      multiply(projection, 0, projection.N, x, base_x, has_rows, qkv_ + projection.first, columns, wanted);
    }
    for (int64_t row = 0; row < rows_; ++row) {
      const float* const base = at(part(row).base.qkv, row_index_[row], columns);
      fetch_ahead(base, columns, columns);
      for (int64_t p = 0; p < layer_.attention_ins; ++p) {
        const Projection& projection = layer_.attention_in[p];
        complete(kIsChange ? base + projection.first : projection.bias,
                 qkv_ + row * columns + projection.first, projection.N);
      }
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
  void attend(Head& head, int64_t p, int64_t row0) {
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
        const auto attend = [&](int64_t i0, int64_t rows) {
          const int64_t i = skipped + i0;
          head.template attend<kArithmetic>(
              qkv_ + (row0 + i) * columns + h * E, columns, rows, part.first + i, layer_.attention_scale,
              attention_ + (row0 + i) * layer_.q_cols() + h * E, layer_.q_cols());
        };
        for_each_row_block(part.count - skipped, attend, Head::kRows);
      }
    }
  }

  // From the attention's last projection to the end, for rows row0 .. row0 + rows - 1. What changes in the
  // residual stream stays with the products, which are added to it.
  void finish(int64_t row0, int64_t rows) {
    const int64_t hidden = layer_.hidden;
    float* const product = take_result(rows, hidden);
    const bool changes_in = any_change(layer_.mlp_in, layer_.mlp_ins);
    const Rows x = take_rows(rows, hidden), base_x = take_rows(changes_in ? rows : 0, hidden);
    const auto wanted = [&](int64_t b) { return has_output(x, b, row0); };
    const bool has_attention = layer_.start <= LayerStart::kAttentionOut;
    // kChange: nothing differs before a later start.
    const bool has_mid = !kIsChange || has_attention;
    if (has_attention) project_attention(row0, rows, product, wanted);
    for (int64_t i = 0; i < rows; ++i) {
      const SequencePart& of = part(row0 + i);
      const int64_t index = row_index_[row0 + i];
      const float* const base = at(of.base.mid, index, hidden);
      fetch_ahead(base, hidden, hidden);
      float* const mid = kIsChange ? product + i * hidden : out(row0 + i);
      if (has_attention) {
        const float* const in = at(of.in, index, hidden);
        fetch_ahead(in, hidden, hidden);
        add_residual(in, layer_.attention_out, product + i * hidden, mid);
        if (of.keep.mid != nullptr) fill(of.keep.mid + index * hidden, mid, hidden);
      } else {
        fill(mid, kIsChange ? nullptr : base, hidden);
      }
      if (layer_.start <= LayerStart::kMlp && (has_mid || changes_in)) {
        norm_row<kArithmetic>(has_mid ? mid : nullptr, base, layer_.mlp_norm, layer_.eps, i, x,
                              changes_in ? &base_x : nullptr);
      }
    }
    multiply_mlp(row0, x, base_x, has_mid, product, wanted);
    for (int64_t i = 0; i < rows; ++i) {
      if (kIsChange) {
        fill(out(row0 + i), product + i * hidden, hidden);
      } else {
        add_residual(out(row0 + i), layer_.mlp_out, product + i * hidden, out(row0 + i));
      }
    }
  }

  // What leaves; until then, but for kChange, the residual stream after the attention.
  float* out(int64_t row) const { return part(row).out + row_index_[row] * layer_.hidden; }

  // sum = what comes in at a residual + what a branch gives, the product of its last projection
  void add_residual(const float* in, const Projection& projection, const float* product, float* sum) const {
    const float* const bias = kIsChange ? nullptr : projection.bias;
    for (int64_t k = 0; k < layer_.hidden; k += 16) {
      __m512 value = load_vector(product, k, layer_.hidden);
      if (bias != nullptr) value = _mm512_add_ps(load_vector(bias, k, layer_.hidden), value);
      value = stored<kArithmetic>(value);
      if (in != nullptr) {
        value = stored<kArithmetic>(_mm512_add_ps(load_vector(in, k, layer_.hidden), value));
      }
      store_vector(sum, k, layer_.hidden, value);
    }
  }

  template <typename Wanted>
  void project_attention(int64_t row0, int64_t rows, float* product, const Wanted& wanted) {
    const int64_t hidden = layer_.hidden, cols = layer_.q_cols();
    const Projection& projection = layer_.attention_out;
    const bool changes = any_change(&projection, 1), own = layer_.start == LayerStart::kAttention;
    float* const before = next_;
    const Rows x = take_rows(rows, cols), base_x = take_rows(changes ? rows : 0, cols);
    for (int64_t i = 0; i < rows; ++i) {
      const SequencePart& of = part(row0 + i);
      const int64_t index = row_index_[row0 + i];
      const float* base = at(of.base.attention, index, cols);
      fetch_ahead(base, cols, cols);
      const float* row = own ? attention_ + (row0 + i) * cols : base;
      if (!kIsChange || own) copy_row(row, kIsChange ? base : nullptr, i, x);
      if (changes) copy_row(base, nullptr, i, base_x);
      if (own && of.keep.attention != nullptr) fill(of.keep.attention + index * cols, row, cols);
    }
    multiply(projection, 0, hidden, x, base_x, !kIsChange || own, product, hidden, wanted);
    next_ = before;
  }

  // product = the MLP's of normed rows x, kChange: is added
  template <typename Wanted>
  void multiply_mlp(int64_t row0, const Rows& x, const Rows& base_x, bool has_mid, float* product,
                    const Wanted& wanted) {
    const int64_t rows = x.count(), wide = layer_.intermediate;
    const bool changes_out = any_change(&layer_.mlp_out, 1);
    const bool own = layer_.start <= LayerStart::kMlp;
    const Rows h = take_rows(rows, wide), base_h = take_rows(changes_out ? rows : 0, wide);
    float* const gate_up = take_result(rows, 2 * kGateCols);
    for (int64_t j = 0; j < wide; j += kGateCols) {
      const int64_t cols = wide - j < kGateCols ? wide - j : kGateCols;
      if (own) project_gate_up(row0, rows, j, cols, x, base_x, has_mid, gate_up, wanted);
      for (int64_t i = 0; i < rows; ++i)
        gate_row(row0 + i, i, j, cols, own, gate_up, h, changes_out ? &base_h : nullptr);
    }
    multiply(layer_.mlp_out, 0, layer_.hidden, h, base_h, !kIsChange || own, product, layer_.hidden, wanted,
             kIsChange);
  }

  // gate_up [rows, 2 * kGateCols] = columns j .. j + cols - 1 of gate and of up, kChange: without the base's
  template <typename Wanted>
  void project_gate_up(int64_t row0, int64_t rows, int64_t j, int64_t cols, const Rows& x, const Rows& base_x,
                       bool has_mid, float* gate_up, const Wanted& wanted) {
    const int64_t wide = layer_.intermediate;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = half * wide + j;
      const Projection* projection = layer_.mlp_in;
      while (column >= projection->first + projection->N) ++projection;
      const int64_t skip = column - projection->first;
      multiply(*projection, skip, cols, x, base_x, has_mid, gate_up + half * kGateCols, 2 * kGateCols,
               wanted);
      if (kIsChange) continue;
      const float* const bias = projection->bias == nullptr ? nullptr : projection->bias + skip;
      for (int64_t i = 0; i < rows; ++i) {
        float* const keep = part(row0 + i).keep.gate_up;
        if (bias == nullptr && keep == nullptr) continue;  // gate_row rounds, too
        float* const row = gate_up + (2 * i + half) * kGateCols;
        complete(bias, row, cols);
        if (keep != nullptr) fill(keep + row_index_[row0 + i] * 2 * wide + column, row, cols);
      }
    }
  }

  // Columns j .. j + cols - 1 of row i of h (and of base_h): the gated products, kChange: their difference.
  void gate_row(int64_t row, int64_t i, int64_t j, int64_t cols, bool own, const float* gate_up,
                const Rows& h, const Rows* base_h) const {
    const int64_t wide = layer_.intermediate;
    const float* const gate = gate_up + 2 * i * kGateCols;
    const float* base = at(part(row).base.gate_up, row_index_[row], 2 * wide);
    if (!kIsChange) {
      const float* const from = own ? gate : base + j;
      const int64_t up = own ? kGateCols : wide;
      for (int64_t k = 0; k < cols; k += 32) {
        const auto product = [&](int64_t at) {
          return gated<kArithmetic>(stored<kArithmetic>(load_vector(from, at, cols)),
                                    stored<kArithmetic>(load_vector(from + up, at, cols)));
        };
        h.store_32(i, j + k, product(k), product(k + 16));
      }
      return;
    }
    base += j;
    fetch_ahead(base, 2 * wide, cols);
    fetch_ahead(base + wide, 2 * wide, cols);
    for (int64_t k = 0; k < cols; k += 32) {
      __m512 products[2], changes[2];
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t at = k + 16 * half;
        const __m512 base_gate = load_vector(base, at, cols), base_up = load_vector(base + wide, at, cols);
        if (base_h != nullptr) products[half] = gated<kArithmetic>(base_gate, base_up);
        if (!own) continue;
        changes[half] = change_of_gated(base_gate, base_up, load_vector(gate, at, cols),
                                        load_vector(gate + kGateCols, at, cols));
      }
      if (base_h != nullptr) base_h->store_32(i, j + k, products[0], products[1]);
      if (own) h.store_32(i, j + k, changes[0], changes[1]);
    }
  }

  // As fine as what is multiplied afterwards.
  static __m512 change_of_gated(__m512 gate, __m512 up, __m512 gate_change, __m512 up_change) {
    if constexpr (Rows::kPieces == 1) return gated_change(gate, up, gate_change, up_change);
    const __m512 new_gate = _mm512_add_ps(gate, gate_change), new_up = _mm512_add_ps(up, up_change);
    return _mm512_sub_ps(gated<kArithmetic>(new_gate, new_up), gated<kArithmetic>(gate, up));
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
