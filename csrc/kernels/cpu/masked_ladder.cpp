#include "masked_ladder.h"

#include <algorithm>
#include <vector>

#include "large_pages.h"
#include "parallel_for.h"
#include "scratch_buffer.h"
#include "sparse_linear.h"
#include "sparse_pack.h"

namespace dtm_fast {
namespace {

// A result of so many bytes leaves the caches anyway before anyone reads it.
constexpr int64_t kStreamedBytes = 8 << 20;

// What each level keeps beyond the next sparser one, in the order of sparse_format.h, without the values.
class Orders {
 public:
  Orders(const MaskedLadder& args, int num_threads)
      : args_(args),
        layout_(sparse_layout(args.N, args.K)),
        mask_(args.V, args.N * row_bytes()),
        rows_(args.V, layout_.panels * layout_.blocks * layout_.panel_rows),
        steps_(args.V, layout_.panels * layout_.blocks * layout_.groups),
        starts_(static_cast<size_t>(args.V)) {
    parallel_for(args.V, num_threads, [&](int64_t v, int) { write_mask(v); });
    SparseStart end = {0, 0};
    for (int64_t v = 0; v < args.V; ++v) {
      sparse_order(order(v), num_threads);
      std::vector<SparseStart>& starts = starts_[static_cast<size_t>(v)];
      starts.resize(static_cast<size_t>(layout_.panels * layout_.blocks + 1));
      sparse_starts(layout_, steps_.part(v), starts.data());
      for (SparseStart& each : starts) each = {end.step + each.step, end.word + each.word};
      end = starts.back();
    }
  }

  SparseOrder order(int64_t v) {
    return {mask_.part(v), row_bytes(), args_.N, args_.K, rows_.part(v), steps_.part(v)};
  }
  // Where a block of a panel begins, or where the level ends, in the lines of all levels.
  SparseStart start(int64_t v, int64_t index) const {
    return starts_[static_cast<size_t>(v)][static_cast<size_t>(index)];
  }
  SparseStart end() const { return starts_.back().back(); }

 private:
  int64_t row_bytes() const { return (args_.K + 7) / 8; }

  void write_mask(int64_t v) {
    for (int64_t n = 0; n < args_.N; ++n) {
      const uint8_t* kept = args_.mask + v * args_.mask_level_stride + n * args_.mask_row_stride;
      const uint8_t* sparser = kept + args_.mask_level_stride;
      uint8_t* added = mask_.part(v) + n * row_bytes();
      if (v == args_.V - 1) {
        std::copy_n(kept, row_bytes(), added);
      } else {
        for (int64_t i = 0; i < row_bytes(); ++i) added[i] = static_cast<uint8_t>(kept[i] & ~sparser[i]);
      }
    }
  }

  const MaskedLadder& args_;
  SparseLayout layout_;
  ScratchBuffer<uint8_t> mask_;
  ScratchBuffer<uint16_t> rows_;
  ScratchBuffer<uint8_t> steps_;
  std::vector<std::vector<SparseStart>> starts_;
};

// Whether y is worth no place in the caches, and made of whole lines of them.
bool can_stream(const MaskedLadder& args) {
  constexpr int64_t kLine = 64;
  return args.type == FloatType::kFloat32 &&
         args.V * args.M * args.N * size_of(args.type) >= kStreamedBytes &&
         reinterpret_cast<uintptr_t>(args.y) % kLine == 0 && args.N * size_of(args.type) % kLine == 0;
}

class Ladder {
 public:
  Ladder(const MaskedLadder& args, const SparseKernels& kernels, int num_threads)
      : args_(args),
        kernels_(kernels),
        layout_(sparse_layout(args.N, args.K)),
        streams_(&kernels == &kSparseAvx512 && can_stream(args)),
        orders_(args, num_threads),
        // One buffer for the values of all levels: malloc keeps it from call to call, as it would not keep
        // many.
        values_(1, orders_.end().step * kSparseLanes),
        columns_(1, orders_.end().word * kSparseLanes * kSparseWord) {
    // All levels of a block of the weight one after the other: after the first it is in the cache.
    parallel_for(layout_.panels * layout_.blocks, num_threads, [&](int64_t index, int) {
      for (int64_t v = 0; v < args_.V; ++v) {
        const SparsePack pack = {args_.type,       args_.weight,    args_.weight_stride,
                                 orders_.order(v), values_.part(0), columns_.part(0)};
        sparse_pack_block(pack, index, orders_.start(v, index));
      }
    });
  }

  void multiply(int num_threads) {
    const int64_t token_tiles = (args_.M + kSparseTokens - 1) / kSparseTokens;
    // Without enough tokens for all threads, each gets fewer panels and transposes x for itself.
    const int64_t shares = std::min(layout_.panels, (num_threads + token_tiles - 1) / token_tiles);
    const int64_t chunk = (layout_.panels + shares - 1) / shares;
    const int64_t chunks = (layout_.panels + chunk - 1) / chunk;
    const int64_t x_size = layout_.blocks * kBlockSize;
    ScratchBuffer<float> scratch(threads_used(token_tiles * chunks, num_threads), x_size + c_size());
    parallel_for(token_tiles * chunks, num_threads, [&](int64_t task, int thread) {
      const int64_t m0 = task / chunks * kSparseTokens, tokens = std::min(kSparseTokens, args_.M - m0);
      const int64_t first = task % chunks * chunk, end = std::min(layout_.panels, first + chunk);
      float* xt = scratch.part(thread);
      transpose_x(m0, tokens, xt);
      for (int64_t p = first; p < end; ++p) multiply_panel(p, m0, tokens, xt, xt + x_size);
    });
  }

 private:
  static constexpr int64_t kBlockSize = kSparseBlockRows * kSparseTokens;
  int64_t c_size() const { return (layout_.panel_rows + 1) * kSparseTokens; }

  // xt [blocks, kSparseBlockRows, kSparseTokens]: every level reads all of it.
  void transpose_x(int64_t m0, int64_t tokens, float* xt) const {
    const void* x = static_cast<const char*>(args_.x) + m0 * args_.x_stride * size_of(args_.type);
    for (int64_t b = 0; b < layout_.blocks; ++b) {
      const int64_t k0 = b * kSparseBlock;
      kernels_.transpose_x(args_.type, x, args_.x_stride, k0, std::min(kSparseBlock, args_.K - k0), tokens,
                           xt + b * kBlockSize);
    }
  }

  // c [panel_rows + 1, kSparseTokens] holds the sums of the levels so far.
  void multiply_panel(int64_t p, int64_t m0, int64_t tokens, const float* xt, float* c) {
    if (layout_.blocks == 0) std::fill(c, c + c_size(), 0.0f);
    for (int64_t v = args_.V - 1; v >= 0; --v) {
      for (int64_t b = 0; b < layout_.blocks; ++b) {
        const bool is_first = v == args_.V - 1 && b == 0;
        kernels_.multiply(block(v, p, b), xt + b * kBlockSize, tokens, is_first, SparseAhead{}, c);
      }
      store_y(v, p * layout_.panel_rows, m0, tokens, c);
    }
  }

  void store_y(int64_t v, int64_t n0, int64_t m0, int64_t tokens, const float* c) const {
    const int64_t rows = std::min(layout_.panel_rows, args_.N - n0);
    char* y = static_cast<char*>(args_.y) + (v * args_.M + m0) * args_.N * size_of(args_.type);
    if (streams_) {
      stream_y_avx512(c, rows, tokens, args_.bias == nullptr ? nullptr : args_.bias + n0,
                      reinterpret_cast<float*>(y) + n0, args_.N);
    } else {
      kernels_.store_y(c, rows, tokens, args_.bias, args_.type, y, args_.N, n0);
    }
  }

  SparseBlock block(int64_t v, int64_t panel, int64_t b) {
    const int64_t index = panel * layout_.blocks + b;
    const SparseStart start = orders_.start(v, index);
    const SparseOrder order = orders_.order(v);
    return {values_.part(0) + start.step * kSparseLanes,
            columns_.part(0) + start.word * kSparseLanes * kSparseWord,
            order.rows + index * layout_.panel_rows, order.steps + index * layout_.groups, layout_.groups};
  }

  const MaskedLadder& args_;
  const SparseKernels& kernels_;
  SparseLayout layout_;
  bool streams_;
  Orders orders_;
  ScratchBuffer<float> values_;
  ScratchBuffer<uint8_t> columns_;
};

}  // namespace

void masked_ladder(CpuIsa isa, const MaskedLadder& args, int num_threads) {
  require_cpu_isa(isa);
  if (args.V == 0 || args.M == 0 || args.N == 0) return;
  populate_large_pages(args.y, args.V * args.M * args.N * size_of(args.type), num_threads);
  Ladder(args, isa >= CpuIsa::kAvx512 ? kSparseAvx512 : kSparseAvx2, num_threads).multiply(num_threads);
}

}  // namespace dtm_fast
