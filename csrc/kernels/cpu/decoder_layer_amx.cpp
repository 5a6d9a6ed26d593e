#include <algorithm>

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
  return std::max(Coarse::scratch_size(layer, positions, context),
                  Fine::scratch_size(layer, positions, context));
}

void pack_rows_two_pieces_amx(const float* matrix, int64_t rows, int64_t K, float* panel) {
  for (int piece = 0; piece < 2; ++piece, panel += kPanelCols * panel_lanes<PairLanes>(K)) {
    const auto load = [&](int64_t j, int64_t k) {
      __m512 low = load_vector(matrix + j * K, k, K), high = load_vector(matrix + j * K, k + 16, K);
      if (piece == 1) take_piece(&low, &high);
      return PairLanes::pairs(low, high);
    };
    pack_panel<PairLanes>(rows, K, load, panel);
  }
}

}  // namespace dtm_fast
