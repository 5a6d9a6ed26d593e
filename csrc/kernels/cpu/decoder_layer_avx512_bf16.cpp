#include "decoder_layer_avx512.h"
#include "pair_lanes_avx512_bf16.h"

namespace dtm_fast {

void layer_change_avx512_bf16(const DecoderLayer& layer, const SequencePart* parts, int64_t count,
                              float* scratch) {
  LayerTask<PackedRows<PairLanes>, LayerArithmetic::kChange>(layer, parts, count, scratch).run();
}

void layer_bfloat16_avx512_bf16(const DecoderLayer& layer, const SequencePart* parts, int64_t count,
                                float* scratch) {
  LayerTask<PackedRows<PairLanes>, LayerArithmetic::kBfloat16>(layer, parts, count, scratch).run();
}

void pack_rows_pairs_avx512_bf16(const float* matrix, int64_t rows, int64_t K, float* panel) {
  pack_panel<PairLanes>(
      rows, K,
      [&](int64_t j, int64_t k) {
        const float* row = matrix + j * K;
        return PairLanes::pairs(load_vector(row, k, K), load_vector(row, k + 16, K));
      },
      panel);
}

}  // namespace dtm_fast
