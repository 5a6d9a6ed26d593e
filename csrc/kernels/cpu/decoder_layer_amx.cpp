#include "decoder_layer_avx512.h"
#include "packed_tiles_amx.h"

namespace dtm_fast {
namespace {

template <int kPieces, LayerArithmetic kArithmetic>
void run(const DecoderLayer& layer, const SequencePart* parts, int64_t count, float* scratch) {
  const TilesInUse tiles;
  LayerTask<PackedTiles<kPieces>, kArithmetic>(layer, parts, count, scratch).run();
}

}  // namespace

void layer_change_amx(const DecoderLayer& layer, const SequencePart* parts, int64_t count, float* scratch) {
  run<1, LayerArithmetic::kChange>(layer, parts, count, scratch);
}

void layer_fine_change_amx(const DecoderLayer& layer, const SequencePart* parts, int64_t count,
                           float* scratch) {
  run<2, LayerArithmetic::kChange>(layer, parts, count, scratch);
}

void layer_bfloat16_amx(const DecoderLayer& layer, const SequencePart* parts, int64_t count, float* scratch) {
  run<1, LayerArithmetic::kBfloat16>(layer, parts, count, scratch);
}

int64_t layer_scratch_size_amx(const DecoderLayer& layer, int64_t positions, int64_t context) {
  using Coarse = LayerTask<PackedTiles<1>, LayerArithmetic::kChange>;
  using Fine = LayerTask<PackedTiles<2>, LayerArithmetic::kChange>;
  const int64_t coarse = Coarse::scratch_size(layer, positions, context);
  const int64_t fine = Fine::scratch_size(layer, positions, context);
  return coarse > fine ? coarse : fine;
}

}  // namespace dtm_fast
