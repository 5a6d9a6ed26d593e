#include "decoder_layer_avx512.h"
#include "packed_pieces_amx.h"

namespace dtm_fast {
namespace {

using Task = LayerTask<PackedPieces, LayerArithmetic::kFloat32>;

}  // namespace

void layer_float32_amx(const DecoderLayer& layer, const SequencePart* parts, int64_t count, float* scratch) {
  const TilesInUse tiles;
  const DenormalsAreZero denormals_are_zero;
  Task(layer, parts, count, scratch).run();
}

int64_t layer_scratch_size_float32_amx(const DecoderLayer& layer, int64_t positions, int64_t context) {
  return Task::scratch_size(layer, positions, context);
}

}  // namespace dtm_fast
