#include "decoder_layer_avx512.h"

namespace dtm_fast {

void layer_float32_avx512(const DecoderLayer& layer, const SequencePart* parts, int64_t count,
                          float* scratch) {
  LayerTask<PackedRows<FloatLanes>, LayerArithmetic::kFloat32>(layer, parts, count, scratch).run();
}

int64_t layer_scratch_size_avx512(const DecoderLayer& layer, int64_t rows, int64_t context) {
  return LayerTask<PackedRows<FloatLanes>, LayerArithmetic::kFloat32>::scratch_size(layer, rows, context);
}

void pack_rows_float32_avx512(const float* matrix, int64_t rows, int64_t K, float* panel) {
  pack_panel<FloatLanes>(
      rows, K, [&](int64_t j, int64_t k) { return _mm512_castps_si512(load_vector(matrix + j * K, k, K)); },
      panel);
}

}  // namespace dtm_fast
