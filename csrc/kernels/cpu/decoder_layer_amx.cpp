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
  const int64_t sizes[] = {
      LayerTask<PackedTiles<1>, LayerArithmetic::kChange>::scratch_size(layer, positions, context),
      LayerTask<PackedTiles<2>, LayerArithmetic::kChange>::scratch_size(layer, positions, context),
      LayerTask<PackedTiles<1>, LayerArithmetic::kBfloat16>::scratch_size(layer, positions, context)};
  int64_t largest = 0;
  for (const int64_t size : sizes) largest = size > largest ? size : largest;
  return largest;
}

}  // namespace dtm_fast
