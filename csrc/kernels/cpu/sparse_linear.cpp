#include "sparse_linear.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "large_pages.h"
#include "parallel_for.h"
#include "scratch_buffer.h"
#include "sparse_pack.h"
#include "store_float.h"

namespace dtm_fast {
namespace {

// Rows of a task with many tokens, at most: their sums, 256 bytes each, share the L2 cache with x.
constexpr int64_t kMostTaskRows = 4096;

std::vector<SparseStart> checked_starts(const SparseWeight& weight, const SparseLayout& layout) {
  std::vector<SparseStart> starts(static_cast<size_t>(layout.panels * layout.blocks + 1));
  sparse_starts(layout, weight.steps, starts.data());
  if (starts.back().step != weight.value_steps || starts.back().word != weight.column_words) {
    throw std::invalid_argument("steps: their sum does not fit the lengths of values and columns");
  }
  return starts;
}

class Product {
 public:
  Product(const SparseLinear& args, const SparseKernels& kernels)
      : args_(args),
        kernels_(kernels),
        layout_(sparse_layout(args.weight.N, args.weight.K)),
        starts_(checked_starts(args.weight, layout_)) {}

  void run(int num_threads) const { args_.M <= kernels_.few_tokens ? few(num_threads) : many(num_threads); }

 private:
  void many(int num_threads) const {
    const int64_t token_tiles = (args_.M + kSparseTokens - 1) / kSparseTokens;
    // Without enough tokens for all threads, each gets fewer rows and transposes x for itself.
    int64_t chunk = std::max<int64_t>(1, kMostTaskRows / layout_.panel_rows);
    const int64_t wanted = (num_threads + token_tiles - 1) / token_tiles;
    chunk = std::min(chunk, (layout_.panels + wanted - 1) / wanted);
    const int64_t chunks = (layout_.panels + chunk - 1) / chunk;
    const int64_t panel_size = (layout_.panel_rows + 1) * kSparseTokens;
    const int64_t xt_size = kSparseBlockRows * kSparseTokens;
    ScratchBuffer<float> scratch(threads_used(token_tiles * chunks, num_threads),
                                 xt_size + chunk * panel_size);
    parallel_for(token_tiles * chunks, num_threads, [&](int64_t task, int thread) {
      const int64_t m0 = task / chunks * kSparseTokens;
      const int64_t tokens = std::min(kSparseTokens, args_.M - m0);
      const int64_t first = task % chunks * chunk, end = std::min(layout_.panels, first + chunk);
      float* xt = scratch.part(thread);
      float* c = xt + xt_size;
      if (layout_.blocks == 0) std::fill(c, c + (end - first) * panel_size, 0.0f);
      for (int64_t b = 0; b < layout_.blocks; ++b) {
        const int64_t k0 = b * kSparseBlock;
        kernels_.transpose_x(args_.type, x_row(m0), args_.x_stride, k0,
                             std::min(kSparseBlock, args_.weight.K - k0), tokens, xt);
        for (int64_t p = first; p < end; ++p) {
          kernels_.multiply(block(p, b), xt, tokens, b == 0, y_ahead(m0, tokens, b, p),
                            c + (p - first) * panel_size);
        }
      }
      for (int64_t p = first; p < end; ++p) {
        const int64_t n0 = p * layout_.panel_rows;
        kernels_.store_y(c + (p - first) * panel_size, std::min(layout_.panel_rows, args_.weight.N - n0),
                         tokens, args_.bias, args_.type, y_row(m0), args_.weight.N, n0);
      }
    });
  }

  void few(int num_threads) const {
    const int64_t M = args_.M, x_stride = layout_.blocks * kSparseBlockRows;
    // x [blocks, M, kSparseBlockRows]: every block followed by the 0 of the padding.
    ScratchBuffer<float> x(1, M * x_stride);
    for (int64_t b = 0; b < layout_.blocks; ++b) {
      const int64_t k0 = b * kSparseBlock, depth = std::min(kSparseBlock, args_.weight.K - k0);
      for (int64_t m = 0; m < M; ++m) {
        float* part = x.part(0) + (b * M + m) * kSparseBlockRows;
        load_floats(x_row(m), args_.type, k0, part, depth);
        std::fill(part + depth, part + kSparseBlockRows, 0.0f);
      }
    }
    const int64_t c_stride = layout_.panel_rows + 1;
    ScratchBuffer<float> scratch(threads_used(layout_.panels, num_threads), M * c_stride);
    parallel_for(layout_.panels, num_threads, [&](int64_t p, int thread) {
      float* c = scratch.part(thread);
      std::fill(c, c + M * c_stride, 0.0f);
      for (int64_t b = 0; b < layout_.blocks; ++b) {
        kernels_.multiply_few(block(p, b), x.part(0) + b * M * kSparseBlockRows, M, c, c_stride);
      }
      const int64_t n0 = p * layout_.panel_rows, rows = std::min(layout_.panel_rows, args_.weight.N - n0);
      for (int64_t m = 0; m < M; ++m) {
        float* sums = c + m * c_stride;
        if (args_.bias != nullptr) {
          for (int64_t n = 0; n < rows; ++n) sums[n] += args_.bias[n0 + n];
        }
        store_floats(args_.y, args_.type, m * args_.weight.N + n0, sums, rows);
      }
    });
  }

  SparseBlock block(int64_t panel, int64_t b) const {
    const int64_t index = panel * layout_.blocks + b;
    const SparseStart& start = starts_[static_cast<size_t>(index)];
    return {args_.weight.values + start.step * kSparseLanes,
            args_.weight.columns + start.word * kSparseLanes * kSparseWord,
            args_.weight.rows + index * layout_.panel_rows, args_.weight.steps + index * layout_.groups,
            layout_.groups};
  }

  // The tokens of a panel of y, shared out among the blocks.
  SparseAhead y_ahead(int64_t m0, int64_t tokens, int64_t b, int64_t panel) const {
    const int64_t n0 = panel * layout_.panel_rows, rows = std::min(layout_.panel_rows, args_.weight.N - n0);
    const int64_t begin = tokens * b / layout_.blocks, end = tokens * (b + 1) / layout_.blocks;
    return {static_cast<const char*>(y_row(m0 + begin)) + n0 * size_of(args_.type),
            args_.weight.N * size_of(args_.type), end - begin, rows * size_of(args_.type)};
  }

  const void* x_row(int64_t m) const {
    return static_cast<const char*>(args_.x) + m * args_.x_stride * size_of(args_.type);
  }
  void* y_row(int64_t m) const {
    return static_cast<char*>(args_.y) + m * args_.weight.N * size_of(args_.type);
  }

  static void load_floats(const void* row, FloatType type, int64_t first, float* out, int64_t count) {
    if (type == FloatType::kFloat32) {
      std::copy_n(static_cast<const float*>(row) + first, count, out);
    } else {
      const uint16_t* bits = static_cast<const uint16_t*>(row) + first;
      for (int64_t i = 0; i < count; ++i) out[i] = float_from_bfloat16(bits[i]);
    }
  }

  const SparseLinear& args_;
  const SparseKernels& kernels_;
  SparseLayout layout_;
  std::vector<SparseStart> starts_;
};

}  // namespace

void sparse_linear(CpuIsa isa, const SparseLinear& args, int num_threads) {
  require_cpu_isa(isa);
  const SparseKernels& kernels = isa >= CpuIsa::kAvx512 ? kSparseAvx512 : kSparseAvx2;
  if (args.M == 0 || args.weight.N == 0) return;
  populate_large_pages(args.y, args.M * args.weight.N * size_of(args.type), num_threads);
  Product(args, kernels).run(num_threads);
}

}  // namespace dtm_fast
