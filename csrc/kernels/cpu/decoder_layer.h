// One layer of a decoder of Llama's kind on parts of sequences: norm, attention with grouped heads and rotary
// positions, norm, gated MLP, each with its residual. Each part is gone through from end to end by one
// thread, so that what is between two products stays in its caches.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"

namespace dtm_fast {

// How a layer is computed. States are float32 in all of them.
enum class LayerArithmetic : int {
  // In float32, in the order of gemm_tile.h, or on AMX in that of float32_pieces.h, where products of numbers
  // of 2^128 - 2^119 and more, which have no pieces, are NaN.
  kFloat32 = 0,
  // What changes against states of the base that are known exactly: only the difference of a projection's
  // input is multiplied, rounded to bfloat16, and added to the base's output,
  //   y' = y_base + W' (x' - x_base) + (W' - W) x_base.
  // All that is not a product is float32. States that enter and leave are differences of the base's.
  kChange = 1,
  // As a model in bfloat16 computes: products sum in float32, and every result is rounded where Hugging Face
  // stores it. All states are numbers of bfloat16.
  kBfloat16 = 2,
  // kChange with differences and weights of 16 bits, each a sum of two numbers of bfloat16.
  kFineChange = 3,
};

// y[:, first : first + N] = x @ weight.T + bias, the weight [N, K] packed by pack_matrix.
struct Projection {
  const float* panels;
  const float* change;  // the packed difference to the base's weight, or nullptr if it is the base's
  // kFineChange: what the two before have lost in packing, packed likewise.
  const float *panels_rest, *change_rest;
  const float* bias;  // [N] or nullptr
  int64_t N, first;
};

// The first thing of a layer that differs from the base; what comes before is taken from its states.
enum class LayerStart : int { kAttention = 0, kAttentionOut = 1, kMlp = 2, kMlpOut = 3 };

struct DecoderLayer {
  LayerArithmetic arithmetic;
  int64_t hidden, heads, kv_heads, head_dim, intermediate;
  float eps, attention_scale;
  const float *attention_norm, *mlp_norm;  // [hidden]
  const float *q_norm, *k_norm;            // [head_dim] or nullptr
  const float *cosine, *sine;              // [positions, head_dim], as Hugging Face makes them
  Projection attention_in[3];              // columns: queries, keys, values
  int64_t attention_ins;
  Projection attention_out;
  Projection mlp_in[2];  // columns: gate, up; intermediate is a multiple of 32
  int64_t mlp_ins;
  Projection mlp_out;
  LayerStart start;

  int64_t q_cols() const { return heads * head_dim; }
  int64_t kv_cols() const { return kv_heads * head_dim; }
  int64_t qkv_cols() const { return q_cols() + 2 * kv_cols(); }
};

// What a layer computes on the way, each [count, columns], or nullptr.
struct LayerStates {
  float* in;         // hidden columns: the residual stream
  float* qkv;        // before the norms of heads and the rotation
  float* attention;  // heads * head_dim: what the last projection of the attention multiplies
  float* mid;        // hidden: the residual stream after the attention
  float* gate_up;    // 2 * intermediate
};

// Positions first .. first + count - 1 of one sequence. All members have 8 bytes: Python fills in an array.
struct SequencePart {
  int64_t first, count;
  int64_t first_output;  // only positions from this one on are wanted: of earlier ones, keys and values alone
  const float* in;       // [count, hidden]; kChange: the difference, nullptr in all parts if there is none
  float* out;            // [count, hidden]; kChange: the difference
  float* kv;         // [first + count, 2 * kv_heads * head_dim]: of all positions so far; these are written
  LayerStates base;  // at `first`; whatever `start` skips must be there, for kChange everything
  LayerStates keep;  // where to keep what is computed (so not `in`), not for kChange
};

void decoder_layer(CpuIsa isa, const DecoderLayer& layer, const SequencePart* parts, int64_t count,
                   int num_threads);

// Whether this instruction set has the arithmetic.
bool has_layer_arithmetic(CpuIsa isa, LayerArithmetic arithmetic);

// Packs a matrix [N, K] of float32 as the products of an arithmetic read it: packed_matrix_size floats.
void pack_matrix(CpuIsa isa, LayerArithmetic arithmetic, const float* matrix, int64_t N, int64_t K,
                 float* packed, int num_threads);
int64_t packed_matrix_size(LayerArithmetic arithmetic, int64_t N, int64_t K);

// Head dimensions that the kernels can hold.
constexpr int64_t kMostHeadDim = 256;

// The kernels of one instruction set: neighbouring parts on one thread. scratch: layer_scratch_size floats.
using LayerKernel = void(const DecoderLayer& layer, const SequencePart* parts, int64_t count, float* scratch);
LayerKernel layer_float32_avx512;
LayerKernel layer_float32_amx;
LayerKernel layer_change_avx512_bf16;
LayerKernel layer_bfloat16_avx512_bf16;
LayerKernel layer_change_amx;
LayerKernel layer_fine_change_amx;
LayerKernel layer_bfloat16_amx;

// For so many positions, none of which sees more than `context`.
using LayerScratchSize = int64_t(const DecoderLayer& layer, int64_t positions, int64_t context);
LayerScratchSize layer_scratch_size_avx512;
LayerScratchSize layer_scratch_size_amx;
LayerScratchSize layer_scratch_size_float32_amx;

// 32 rows [32 or fewer, K] of a matrix as a panel; AMX reads those of pairs, too.
using PackRows = void(const float* matrix, int64_t rows, int64_t K, float* panel);
PackRows pack_rows_float32_avx512;
PackRows pack_rows_pairs_avx512_bf16;

struct LayerChoice {
  LayerKernel* run;
  LayerScratchSize* scratch_size;
  PackRows* pack;
  // Neighbouring short parts go together until they have so many rows: fewer would be multiplied in the time
  // that the weights take to come.
  int64_t task_rows;
};
LayerChoice choose_layer_kernel(CpuIsa isa, LayerArithmetic arithmetic);

}  // namespace dtm_fast
