// masked_linear in float32 for few rows of x: every step of 32 of K is split into pieces and masked into one
// small buffer, from which it is multiplied while the next step follows. The sums stay in their tiles.
#include "few_rows_amx.h"
#include "float32_steps_amx.h"
#include "mask_words_avx512.h"
#include "masked_linear_float32_store.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStepSize = kStepRows * kBfloat16Step;  // of a piece
constexpr int64_t kStepPieces = kFloat32Pieces * kStepSize;
constexpr int64_t kMaskAheadBytes = 64;  // how far ahead of its use a mask is fetched

using Rows = Strip<float, kStepRows>;

// Rows j0 .. j1 - 1 of step [kFloat32Pieces, 32, 32], which begins at k.
template <bool kWhole>
DTM_FAST_INLINE void copy_step(const Rows& w, int64_t k, int64_t j0, int64_t j1, uint16_t* step) {
  const int64_t depth = w.K - k, ahead = w.ahead(k);
  const __mmask32 there = kWhole ? ~__mmask32{0} : first_words(depth);
  // Locals, for all that the compiler knows the stores could change w.
  const float* const weight = w.weight + k;
  const uint8_t* const mask = w.mask + k / 8;
  const int64_t weight_stride = w.weight_stride, mask_stride = w.mask_stride;
  const bool in_memory = w.in_memory;
#pragma GCC unroll 4
  for (int64_t j = j0; j < j1; ++j) {
    const float* from = weight + j * weight_stride;
    if (in_memory) {
      for (int64_t line = 0; line < kBfloat16Step; line += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(from + ahead + line), _MM_HINT_T1);
      }
    }
    const Float32Pieces row = load_weights(from, there);
    const uint8_t* bits = mask + j * mask_stride;
    _mm_prefetch(reinterpret_cast<const char*>(bits) + kMaskAheadBytes, _MM_HINT_T0);
    const __mmask32 kept = kWhole ? mask_bits(bits, 0) : there & mask_bits_to_end(bits, 0, depth);
#pragma GCC unroll 3
    for (int p = 0; p < kFloat32Pieces; ++p) {
      _mm512_store_si512(step + p * kStepSize + j * kBfloat16Step, pairs_of(row, p, kept));
    }
  }
}

// The float32 sums of tiles 0-3, and what sums_of_block needs beside them. Columns that are no rows of x stay
// as they are.
struct alignas(64) Sums {
  float all[2 * kGroupSums] = {}, of_eight[2 * kGroupSums] = {}, buffer[2 * kGroupSums] = {};
};

// sums.all [kGroups][32][16] = the rows times x, packed in groups of group_rows rows. Tiles and vectors work
// side by side: one of the products of a step, then some rows of the next, which is copied meanwhile. buffer
// [2] steps.
template <int kGroups>
void multiply_rows(const Rows& w, const uint16_t* x, int64_t group_rows, uint16_t* buffer, Sums& sums) {
  const int64_t rows = w.rows, K = w.K, steps = (K + kBfloat16Step - 1) / kBfloat16Step;
  const int64_t step_of_x = piece_group_size(kBfloat16Step, group_rows);
  const PieceBlocks blocks(K);
  int64_t k0 = 0;  // of the block
  zero_sums();
  for (int64_t s = 0; s <= steps; ++s) {
    uint16_t* const filled = buffer + s % 2 * kStepPieces;
    const StepOfWeight used = {buffer + (s + 1) % 2 * kStepPieces, kStepSize, kStepSize / 2, kTileRowBytes};
    const StepOfGroup used_x = {x + (s > 0 ? s - 1 : 0) * step_of_x, steps * step_of_x, group_rows};
    const int64_t k = s * kBfloat16Step;
#pragma GCC unroll 6
    for (int p = 0; p < kPieceProducts; ++p) {
      const int64_t j0 = rows * p / kPieceProducts & ~3;
      const int64_t j1 = p + 1 < kPieceProducts ? rows * (p + 1) / kPieceProducts & ~3 : rows;
      if (s > 0) add_product<kGroups>(p, used, used_x);
      if (k + kBfloat16Step <= K) {
        copy_step<true>(w, k, j0, j1, filled);
      } else if (k < K) {
        copy_step<false>(w, k, j0, j1, filled);
      }
    }
    finish_writes(filled);
    if (s == 0 || (s < steps && k < blocks.after(k0))) continue;
    const BlockSums block =
        sums_of_block(blocks, k0, kGroups * kGroupSums, sums.all, sums.of_eight, sums.buffer);
    store_sums<kGroups>(block.to);
    add(block.then, 0, block.then.count);
    k0 = blocks.after(k0);
    zero_sums();
  }
}

}  // namespace

void masked_linear_few_float32_amx(const MaskedLinear& args, const Float32Tile& tile,
                                   const uint16_t* packed_x) {
  const int64_t group_rows = rows_of_groups(args.M);
  const TilesInUse tiles(group_rows);
  const DenormalsAreZero denormals_are_zero;
  alignas(64) uint16_t buffer[2 * kStepPieces] = {};  // rows that are not there must be finite
  Sums sums;
  const auto multiply = tile.rows > kBfloat16Group ? multiply_rows<2> : multiply_rows<1>;
  for (int64_t j = 0; j < tile.cols; j += kStepRows) {
    const int64_t rows = smaller(kStepRows, tile.cols - j), n = tile.n0 + j;
    for (int64_t v = tile.v0; v < tile.v0 + tile.variants; ++v) {
      multiply(Rows(args, n, rows, v, v == tile.v0), packed_x, group_rows, buffer, sums);
      for (int64_t i = 0; i < tile.rows; i += kBfloat16Group) {
        store_float32_block(args, v, tile.m0 + i, smaller(kBfloat16Group, tile.rows - i), n, rows,
                            sums.all + i / kBfloat16Group * kGroupSums, tile.marks + i);
      }
    }
  }
}

}  // namespace dtm_fast
