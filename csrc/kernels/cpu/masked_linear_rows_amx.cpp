// masked_linear in bfloat16 for so many rows of x that packing the masked weight is worth it, see
// row_tiles.h.
#include "bfloat16_panel.h"
#include "masked_linear_bfloat16.h"
#include "row_tiles_amx.h"

namespace dtm_fast {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

RowTiles size_of_product(const MaskedLinear& args) { return {args.M, args.N, 2 * args.K}; }

// packed = rows m0 .. of x; zero beyond K and in the rows that fill up the last block.
void pack_rows(const MaskedLinear& args, int64_t m0, int64_t rows, int64_t steps, char* packed) {
  for (int64_t i = 0; i < RowTiles::blocks(rows) * kTileBlock; ++i) {
    const uint16_t* x = static_cast<const uint16_t*>(args.x) + (m0 + i) * args.x_stride;
    for (int64_t s = 0; s < steps; ++s) {
      const __mmask32 words = i < rows ? first_words(args.K - s * kBfloat16Step) : 0;
      _mm512_store_si512(packed_row(packed, steps, i, s),
                         _mm512_maskz_loadu_epi16(words, x + s * kBfloat16Step));
    }
  }
}

// y[v, m : m + rows, n : n + cols] from the sums of a block.
void store_rows(const MaskedLinear& args, int64_t v, int64_t m, int64_t rows, int64_t n, int64_t cols,
                const float* sums) {
  __m512 bias[2] = {};
  if (args.bias != nullptr) {
    bias[0] = _mm512_maskz_loadu_ps(first_lanes(cols), args.bias + n);
    bias[1] = _mm512_maskz_loadu_ps(first_lanes(cols > 16 ? cols - 16 : 0), args.bias + n + 16);
  }
  uint16_t* y = static_cast<uint16_t*>(args.y) + (v * args.M + m) * args.N + n;
  for (int64_t i = 0; i < rows; ++i, y += args.N) {
    const float* own = sums_of_row(sums, i);
    __m512 low = _mm512_load_ps(own), high = _mm512_load_ps(own + kTileSums);
    if (args.bias != nullptr) {
      low = _mm512_add_ps(low, bias[0]);
      high = _mm512_add_ps(high, bias[1]);
    }
    _mm512_mask_storeu_epi16(y, first_words(cols), bfloat16_words(low, high));
  }
}

}  // namespace

void masked_pack_weight_amx(const MaskedLinear& args, int64_t v, int64_t block, char* packed) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t n = block * kTileBlock + half * kTileRows;
    const uint16_t* weight = static_cast<const uint16_t*>(args.weight) + n * args.weight_stride;
    const uint8_t* mask = args.mask + v * args.mask_variant_stride + n * args.mask_row_stride;
    const int64_t rows = smaller(kTileRows, args.N - n);
    for (int64_t s = 0; s < size_of_product(args).steps(); ++s) {
      const int64_t k = s * kBfloat16Step, left = args.K - k;
      // Weights that are masked out are never read, so what they hold does not count.
      const auto load = [&](int64_t j) {
        if (j >= rows) return _mm512_setzero_si512();
        const uint8_t* mask_row = mask + j * args.mask_row_stride;
        const __mmask32 kept = left >= kBfloat16Step
                                   ? mask_bits(mask_row, k)
                                   : first_words(left) & mask_bits_to_end(mask_row, k, args.K);
        return _mm512_maskz_loadu_epi16(kept, weight + j * args.weight_stride + k);
      };
      pack_weight_tile(load, packed + s * kStepBytes + half * kTileBytes);
    }
  }
}

void masked_linear_rows_amx(const MaskedLinear& args, int64_t v, const char* packed_weight, int64_t m0,
                            int64_t rows, const MaskedRowScratch& scratch) {
  const TilesInUse tiles;
  const RowTiles size = size_of_product(args);
  pack_rows(args, m0, rows, size.steps(), scratch.rows);
  finish_writes(scratch.rows);
  multiply_rows<Bfloat16Product>(scratch.rows, RowTiles::blocks(rows), packed_weight, args.N, size.steps(),
                                 scratch.sums, [&](int64_t i, int64_t n, const float* sums) {
                                   store_rows(args, v, m0 + i, smaller(kTileBlock, rows - i), n,
                                              smaller(kTileBlock, args.N - n), sums);
                                 });
}

}  // namespace dtm_fast
