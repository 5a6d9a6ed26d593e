// int8_linear on AMX for so many tokens that packing the weight is worth it: a thread quantizes some rows of
// x and multiplies them by all of the packed weight, so that they never leave its second-level cache.
#include "int8_linear.h"
#include "quantize_int8.h"
#include "row_tiles_amx.h"

namespace dtm_fast {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// packed = rows m0 .. of x, quantized; zero beyond K and in the rows that fill up the last block.
void pack_rows(const Int8Linear& args, int64_t m0, int64_t rows, int64_t steps, int8_t* quantized,
               float* scale, char* packed) {
  const int64_t all = RowTiles::blocks(rows) * kTileBlock;
  for (int64_t i0 = 0; i0 < all; i0 += kTileRows) {
    const int64_t count = i0 < rows ? smaller(kTileRows, rows - i0) : 0;
    const void* x = static_cast<const char*>(args.x) + (m0 + i0) * args.x_stride * size_of(args.type);
    quantize_int8_rows_avx512(x, args.type, args.x_stride, count, args.K, quantized, scale + i0);
    for (int64_t i = 0; i < kTileRows; ++i) {
      for (int64_t s = 0; s < steps; ++s) {
        const __mmask64 bytes = i < count ? first_bytes(args.K - s * kTileRowBytes) : 0;
        _mm512_store_si512(packed_row(packed, steps, i0 + i, s),
                           _mm512_maskz_loadu_epi8(bytes, quantized + i * args.K + s * kTileRowBytes));
      }
    }
  }
}

// y[m : m + rows, n : n + cols] from the sums of a block; scale_x belongs to row m.
template <FloatType type>
void store_rows(const Int8Linear& args, const float* scale_x, int64_t m, int64_t rows, int64_t n,
                int64_t cols, const int32_t* sums) {
  const __mmask16 lanes[2] = {first_lanes(cols), first_lanes(cols > 16 ? cols - 16 : 0)};
  __m512 scale_w[2], bias[2] = {};
  for (int half = 0; half < 2; ++half) {
    scale_w[half] = _mm512_maskz_loadu_ps(lanes[half], args.scale_w + n + 16 * half);
    if (args.bias != nullptr) bias[half] = _mm512_maskz_loadu_ps(lanes[half], args.bias + n + 16 * half);
  }
  for (int64_t i = 0; i < rows; ++i) {
    __m512 value[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scale_x[i]), scale_w[half]);
      const __m512i sum = _mm512_load_si512(sums_of_row(sums, i) + half * kTileSums);
      value[half] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
      if (args.bias != nullptr) value[half] = _mm512_add_ps(value[half], bias[half]);
    }
    const int64_t at = (m + i) * args.N + n;
    const bool streamed = args.stream_y && cols == kTileBlock;
    if (type == FloatType::kFloat32) {
      float* y = static_cast<float*>(args.y) + at;
      if (streamed) {
        _mm512_stream_ps(y, value[0]);
        _mm512_stream_ps(y + 16, value[1]);
      } else {
        _mm512_mask_storeu_ps(y, lanes[0], value[0]);
        _mm512_mask_storeu_ps(y + 16, lanes[1], value[1]);
      }
    } else {
      uint16_t* y = static_cast<uint16_t*>(args.y) + at;
      const __m512i words = bfloat16_words(value[0], value[1]);
      if (streamed) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(y), words);
      } else {
        _mm512_mask_storeu_epi16(y, first_words(cols), words);
      }
    }
  }
}

}  // namespace

void int8_pack_weight_amx(const Int8Linear& args, int64_t block, char* packed) {
  const int64_t n0 = block * kTileBlock;
  const int64_t steps = RowTiles{args.M, args.N, args.K}.steps();
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t s = 0; s < steps; ++s) {
      const __mmask64 bytes = first_bytes(args.K - s * kTileRowBytes);
      const int64_t n = n0 + half * kTileRows;
      const auto load = [&](int64_t j) {
        return _mm512_maskz_loadu_epi8(n + j < args.N ? bytes : 0,
                                       args.qweight + (n + j) * args.qweight_stride + s * kTileRowBytes);
      };
      pack_weight_tile(load, packed + s * kStepBytes + half * kTileBytes);
    }
  }
}

void int8_rows_amx(const Int8Linear& args, const char* packed_weight, int64_t m0, int64_t rows,
                   const Int8RowScratch& scratch) {
  const TilesInUse tiles;
  const int64_t steps = RowTiles{args.M, args.N, args.K}.steps();
  pack_rows(args, m0, rows, steps, scratch.quantized, scratch.scale, scratch.rows);
  finish_writes(scratch.rows);
  const auto store =
      args.type == FloatType::kFloat32 ? store_rows<FloatType::kFloat32> : store_rows<FloatType::kBfloat16>;
  multiply_rows<Int8Product>(scratch.rows, RowTiles::blocks(rows), packed_weight, args.N, steps, scratch.sums,
                             [&](int64_t i, int64_t n, const int32_t* sums) {
                               store(args, scratch.scale + i, m0 + i, smaller(kTileBlock, rows - i), n,
                                     smaller(kTileBlock, args.N - n), sums);
                             });
  if (args.stream_y) _mm_sfence();
}

}  // namespace dtm_fast
