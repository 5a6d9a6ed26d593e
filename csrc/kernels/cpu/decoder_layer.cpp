#include "decoder_layer.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "parallel_for.h"
#include "scratch_buffer.h"

namespace dtm_fast {
namespace {

constexpr int64_t kPanelRows = 32;

struct Task {
  int64_t first, count, rows, context;
};

// As many tasks as there are runs of task_rows, but as many for each thread as for the others.
std::vector<Task> tasks_of(const SequencePart* parts, int64_t count, int64_t task_rows, int64_t threads) {
  int64_t rows = 0;
  for (int64_t p = 0; p < count; ++p) rows += parts[p].count;
  const int64_t wanted = (rows + task_rows * threads - 1) / (task_rows * threads) * threads;
  const int64_t share = (rows + wanted - 1) / std::max<int64_t>(1, wanted);
  std::vector<Task> tasks;
  for (int64_t p = 0; p < count; ++p) {
    if (tasks.empty() || tasks.back().rows + parts[p].count > share) tasks.push_back({p, 0, 0, 0});
    Task& task = tasks.back();
    ++task.count;
    task.rows += parts[p].count;
    task.context = std::max(task.context, parts[p].first + parts[p].count);
  }
  // The largest first, or the last one could keep the others waiting.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.rows > b.rows; });
  return tasks;
}

// Of a panel, for each of its columns.
int64_t panel_floats(LayerArithmetic arithmetic, int64_t K) {
  return arithmetic == LayerArithmetic::kFloat32 ? (K + 15) / 16 * 16 : (K + 31) / 32 * 16;
}

void require(CpuIsa isa, LayerArithmetic arithmetic) {
  require_cpu_isa(isa);
  if (!has_layer_arithmetic(isa, arithmetic)) {
    throw std::invalid_argument("decoder_layer: this instruction set has no kernel for the arithmetic");
  }
}

}  // namespace

bool has_layer_arithmetic(CpuIsa isa, LayerArithmetic arithmetic) {
  switch (arithmetic) {
    case LayerArithmetic::kFloat32:
      return isa >= CpuIsa::kAvx512;
    case LayerArithmetic::kFineChange:  // three products: elsewhere float32 is faster
      return isa >= CpuIsa::kAmx;
    default:  // without instructions for pairs of bfloat16, float32 is faster
      return isa >= CpuIsa::kAvx512Bf16;
  }
}

LayerChoice choose_layer_kernel(CpuIsa isa, LayerArithmetic arithmetic) {
  const bool tiles = isa >= CpuIsa::kAmx;
  LayerScratchSize* const size = tiles ? layer_scratch_size_amx : layer_scratch_size_avx512;
  const int64_t task_rows = tiles ? 208 : 96;
  switch (arithmetic) {
    case LayerArithmetic::kFloat32:
      return {tiles ? layer_float32_amx : layer_float32_avx512,
              tiles ? layer_scratch_size_float32_amx : layer_scratch_size_avx512, pack_rows_float32_avx512,
              task_rows};
    case LayerArithmetic::kFineChange:
      return {layer_fine_change_amx, size, pack_rows_pairs_avx512_bf16, task_rows};
    case LayerArithmetic::kChange:
      return {tiles ? layer_change_amx : layer_change_avx512_bf16, size, pack_rows_pairs_avx512_bf16,
              task_rows};
    default:
      return {tiles ? layer_bfloat16_amx : layer_bfloat16_avx512_bf16, size, pack_rows_pairs_avx512_bf16,
              task_rows};
  }
}

void decoder_layer(CpuIsa isa, const DecoderLayer& layer, const SequencePart* parts, int64_t count,
                   int num_threads) {
  require(isa, layer.arithmetic);
  const LayerChoice choice = choose_layer_kernel(isa, layer.arithmetic);
  const std::vector<Task> tasks = tasks_of(parts, count, choice.task_rows, std::max(1, num_threads));
  int64_t size = 0;
  for (const Task& task : tasks) {
    size = std::max(size, choice.scratch_size(layer, task.rows, task.context));
  }
  const auto task_count = static_cast<int64_t>(tasks.size());
  ScratchBuffer<float> scratch(threads_used(task_count, num_threads), size);
  parallel_for(task_count, num_threads, [&](int64_t index, int thread) {
    const Task& task = tasks[static_cast<size_t>(index)];
    choice.run(layer, parts + task.first, task.count, scratch.part(thread));
  });
}

int64_t packed_matrix_size(LayerArithmetic arithmetic, int64_t N, int64_t K) {
  return (N + kPanelRows - 1) / kPanelRows * kPanelRows * panel_floats(arithmetic, K);
}

void pack_matrix(CpuIsa isa, LayerArithmetic arithmetic, const float* matrix, int64_t N, int64_t K,
                 float* packed, int num_threads) {
  require(isa, arithmetic);
  PackRows* const pack = choose_layer_kernel(isa, arithmetic).pack;
  parallel_for((N + kPanelRows - 1) / kPanelRows, num_threads, [&](int64_t panel, int) {
    const int64_t n0 = panel * kPanelRows;
    pack(matrix + n0 * K, std::min(kPanelRows, N - n0), K, packed + n0 * panel_floats(arithmetic, K));
  });
}

}  // namespace dtm_fast
