// Product of int8 activations and int8 weights with one scale per row of each.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"

namespace dtm_fast {

// x        : [M, K] of type, row stride x_stride
// qweight  : [N, K] int8 in [-128, 127], row stride qweight_stride
// scale_w  : [N] float32
// bias     : [N] float32, or nullptr
// y        : [M, N] of type, row stride N
//
//   qx, scale_x = quantize_int8(x)                                                    (see quantize_int8.h)
//   acc[m, n] = sum_k qx[m, k] * qweight[n, k]                                        (int32, exact)
//   y[m, n]   = type(float32(acc[m, n]) * (scale_x[m] * scale_w[n]) + bias[n])        (each step rounded)
//
// K <= kInt8LinearMaxK. Since |qx * qweight| <= 2^14, every sum over so many stays below 2^31. A kernel may
// pass through larger sums (VNNI adds 128 to one factor and takes 128 times the sum of the other away again):
// int32 additions wrap modulo 2^32, so the final value is right whenever it fits.
struct Int8Linear {
  FloatType type;
  const void* x;
  int64_t x_stride;
  const int8_t* qweight;
  int64_t qweight_stride;
  const float* scale_w;
  const float* bias;
  int64_t M, N, K;
  void* y;
  // Set by int8_linear itself: whole lines of y pass by the caches. Then its rows are on lines of cache.
  bool stream_y = false;
};

constexpr int64_t kInt8LinearMaxK = (int64_t{1} << 17) - 1;

void int8_linear(CpuIsa isa, const Int8Linear& args, int num_threads);

// A tile of sums for few tokens or plain instruction sets: acc[i, j] = sum_k qx[i, k] * qweight[j, k] for
// i < rows, j < cols; each has its row stride.
using Int8DotTile = void(const int8_t* qx, int64_t qx_stride, int64_t rows, const int8_t* qweight,
                         int64_t qweight_stride, int64_t cols, int64_t K, int32_t* acc, int64_t acc_stride);
Int8DotTile int8_dot_tile_avx2;
Int8DotTile int8_dot_tile_avx512;
Int8DotTile int8_dot_tile_avx512_vnni;

// Many tokens: the weight is read as it lies, and 16 tokens share a vector or a tile. So nothing of the
// weight is packed beforehand, only the tokens, while they are quantized.
//
// packed   : [ceil(M / 16), groups, 16, 4] = qx, groups = int8_token_groups(K): four neighbours of K for each
//            token, 0 beyond M and K
// scale    : [M] float32
// start    : [16 * ceil(M / 16)] = -128 * sum_k qx[m, k], where the sums of VNNI start
struct Int8Tokens {
  int8_t* packed;
  float* scale;
  int32_t* start;
};

constexpr int64_t kInt8TokenBlock = 16;

static constexpr int64_t int8_token_groups(int64_t K) { return (K + 63) / 64 * 16; }

// Packs a block of `count` <= 16 tokens, [count, K].
void int8_pack_tokens_avx512(const int8_t* qx, int64_t count, int64_t K, int8_t* packed, int32_t* start);

// y[m0 : m0 + rows, n0 : n0 + cols]; m0 is a multiple of kInt8TokenBlock, rows <= kInt8TokenTileRows.
using Int8TokenTile = void(const Int8Linear& args, const Int8Tokens& tokens, int64_t m0, int64_t rows,
                           int64_t n0, int64_t cols);
Int8TokenTile int8_token_tile_avx512_vnni;
Int8TokenTile int8_token_tile_amx;

constexpr int64_t kInt8TokenTileRows = 512;

// So many tokens that packing the weight is worth it, see row_tiles.h.

// Packs weight rows 32 * block and following: RowTiles::block_bytes() of the packed weight.
void int8_pack_weight_amx(const Int8Linear& args, int64_t block, char* packed);

// What a task of `rows` rows needs, all on lines of cache.
struct Int8RowScratch {
  int8_t* quantized;  // [16, K]
  float* scale;       // [rows, rounded up to 32]
  char* rows;         // RowTiles::block_bytes() for each 32 rows
  int32_t* sums;      // kBlockSums for each 32 rows
};

// y[m0 : m0 + rows, :]
void int8_rows_amx(const Int8Linear& args, const char* packed_weight, int64_t m0, int64_t rows,
                   const Int8RowScratch& scratch);

}  // namespace dtm_fast
