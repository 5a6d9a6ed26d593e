#include "decoder_layer.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "parallel_for.h"
#include "scratch_buffer.h"

namespace dtm_fast {
namespace {

// Neighbouring short parts go together until they have so many rows: fewer would be multiplied in the time
// that the weights take to come.
constexpr int64_t kTaskRows = 96;
constexpr int64_t kPanelRows = 32;

LayerKernel* choose(LayerArithmetic arithmetic) {
  switch (arithmetic) {
    case LayerArithmetic::kFloat32:
      return layer_float32_avx512;
    case LayerArithmetic::kChange:
      return layer_change_avx512_bf16;
    default:
      return layer_bfloat16_avx512_bf16;
  }
}

struct Task {
  int64_t first, count, rows, context;
};

// As many tasks as there are runs of kTaskRows, but as many for each thread as for the others.
std::vector<Task> tasks_of(const SequencePart* parts, int64_t count, int64_t threads) {
  int64_t rows = 0;
  for (int64_t p = 0; p < count; ++p) rows += parts[p].count;
  const int64_t wanted = (rows + kTaskRows * threads - 1) / (kTaskRows * threads) * threads;
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

int64_t lanes_of(LayerArithmetic arithmetic, int64_t K) {
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
  // On AMX pairs of bfloat16 are multiplied by tiles, for which there is no kernel yet; without them, at half
  // the speed of float32.
  return arithmetic == LayerArithmetic::kFloat32 ? isa >= CpuIsa::kAvx512 : isa == CpuIsa::kAvx512Bf16;
}

void decoder_layer(CpuIsa isa, const DecoderLayer& layer, const SequencePart* parts, int64_t count,
                   int num_threads) {
  require(isa, layer.arithmetic);
  const std::vector<Task> tasks = tasks_of(parts, count, std::max(1, num_threads));
  int64_t size = 0;
  for (const Task& task : tasks) {
    size = std::max(size, layer_scratch_size_avx512(layer, task.rows, task.context));
  }
  const auto task_count = static_cast<int64_t>(tasks.size());
  ScratchBuffer<float> scratch(threads_used(task_count, num_threads), size);
  LayerKernel* const run = choose(layer.arithmetic);
  parallel_for(task_count, num_threads, [&](int64_t index, int thread) {
    const Task& task = tasks[static_cast<size_t>(index)];
    run(layer, parts + task.first, task.count, scratch.part(thread));
  });
}

int64_t packed_matrix_size(LayerArithmetic arithmetic, int64_t N, int64_t K) {
  return (N + kPanelRows - 1) / kPanelRows * kPanelRows * lanes_of(arithmetic, K);
}

void pack_matrix(CpuIsa isa, LayerArithmetic arithmetic, const float* matrix, int64_t N, int64_t K,
                 float* packed, int num_threads) {
  require(isa, arithmetic);
  PackRows* const pack =
      arithmetic == LayerArithmetic::kFloat32 ? pack_rows_float32_avx512 : pack_rows_pairs_avx512_bf16;
  parallel_for((N + kPanelRows - 1) / kPanelRows, num_threads, [&](int64_t panel, int) {
    const int64_t n0 = panel * kPanelRows;
    pack(matrix + n0 * K, std::min(kPanelRows, N - n0), K, packed + n0 * lanes_of(arithmetic, K));
  });
}

}  // namespace dtm_fast
