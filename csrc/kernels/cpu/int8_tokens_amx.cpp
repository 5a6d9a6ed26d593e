// int8_linear for many tokens on AMX tiles: TDPBSUD multiplies 16 weight rows by 16 packed tokens, 64 of K at
// a time (Intel 64 and IA-32 Architectures Optimization Reference Manual, "Intel Advanced Matrix
// Extensions"). The weight is a tile as it lies in memory, signed; the packed tokens are one as they are,
// unsigned.
#include "int8_token_tile.h"

namespace dtm_fast {
namespace {

constexpr int64_t kTile = 16;  // rows of a tile, each of 64 bytes
constexpr int64_t kBlock = 2 * kTile;
constexpr int64_t kAccStride = kBlock;

// Palette 1: tiles 0-3 hold sums, 4 and 5 weights, 6 and 7 tokens, all of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 16 weight rows: the whole multiples of 64 of K where they lie, the rest copied and filled up with zeros, so
// that no tile reads beyond a row.
struct WeightRows {
  const int8_t* rows = nullptr;
  int64_t stride = 0;
  alignas(64) int8_t rest[kTile * kVectorBytes];

  void set(const int8_t* first_row, int64_t row_stride, int64_t K) {
    rows = first_row;
    stride = row_stride;
    const int64_t whole = K / kVectorBytes * kVectorBytes;
    if (whole == K) return;
    for (int64_t i = 0; i < kTile; ++i) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(K - whole), rows + i * stride + whole);
      _mm512_store_si512(rest + i * kVectorBytes, bytes);
    }
  }
};

// acc[j, i] for kWeights * 16 weight rows j and kTokens * 16 tokens i; acc has row stride kAccStride.
template <int kWeights, int kTokens>
void multiply_tiles(const WeightRows* weights, const uint8_t* tokens, int64_t block_size, int64_t K,
                    int32_t* acc) {
  _tile_zero(0);
  if (kTokens == 2) _tile_zero(1);
  if (kWeights == 2) _tile_zero(2);
  if (kWeights == 2 && kTokens == 2) _tile_zero(3);
  for (int64_t k = 0; k < K; k += kVectorBytes) {
    const bool whole = k + kVectorBytes <= K;
    const int8_t* w0 = whole ? weights[0].rows + k : weights[0].rest;
    _tile_loadd(4, w0, whole ? weights[0].stride : kVectorBytes);
    _tile_loadd(6, tokens + k * kLanes, kVectorBytes);
    _tile_dpbsud(0, 4, 6);
    if (kTokens == 2) {
      _tile_loadd(7, tokens + block_size + k * kLanes, kVectorBytes);
      _tile_dpbsud(1, 4, 7);
    }
    if (kWeights == 2) {
      const int8_t* w1 = whole ? weights[1].rows + k : weights[1].rest;
      _tile_loadd(5, w1, whole ? weights[1].stride : kVectorBytes);
      _tile_dpbsud(2, 5, 6);
      if (kTokens == 2) _tile_dpbsud(3, 5, 7);
    }
  }
  constexpr int64_t kRowBytes = kAccStride * 4;
  _tile_stored(0, acc, kRowBytes);
  if (kTokens == 2) _tile_stored(1, acc + kTile, kRowBytes);
  if (kWeights == 2) _tile_stored(2, acc + kTile * kAccStride, kRowBytes);
  if (kWeights == 2 && kTokens == 2) _tile_stored(3, acc + kTile * kAccStride + kTile, kRowBytes);
}

// The sums of j_count <= 32 weight rows and one or two blocks of tokens.
void multiply_block(const WeightRows* weights, const uint8_t* tokens, int64_t block_size, int64_t blocks,
                    int64_t j_count, int64_t K, int32_t* acc) {
  if (j_count == kBlock) {
    blocks == 2 ? multiply_tiles<2, 2>(weights, tokens, block_size, K, acc)
                : multiply_tiles<2, 1>(weights, tokens, block_size, K, acc);
    return;
  }
  int64_t j = 0;
  if (j_count >= kTile) {
    blocks == 2 ? multiply_tiles<1, 2>(weights, tokens, block_size, K, acc)
                : multiply_tiles<1, 1>(weights, tokens, block_size, K, acc);
    j = kTile;
  }
  if (j == j_count) return;
  const int8_t* qweight = weights[j / kTile].rows;
  if (blocks == 2) {
    multiply_columns<2>(tokens, block_size, qweight, weights[j / kTile].stride, j_count - j, K,
                        acc + j * kAccStride, kAccStride);
  } else {
    multiply_columns<1>(tokens, block_size, qweight, weights[j / kTile].stride, j_count - j, K,
                        acc + j * kAccStride, kAccStride);
  }
}

}  // namespace

void int8_token_tile_amx(const Int8Linear& args, const uint8_t* tokens, int64_t m0, int64_t rows, int64_t n0,
                         int64_t cols) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t block_size = int8_token_groups(args.K) * kVectorBytes;
  alignas(64) int32_t acc[kBlock * kAccStride];
  int32_t offset[kBlock];
  WeightRows weights[2];
  for (int64_t j0 = 0; j0 < cols; j0 += kBlock) {
    const int64_t j_count = cols - j0 < kBlock ? cols - j0 : kBlock;
    const int8_t* qweight = args.qweight + (n0 + j0) * args.qweight_stride;
    for (int64_t j = 0; j < j_count; ++j) offset[j] = offset_part(qweight + j * args.qweight_stride, args.K);
    for (int64_t j = 0; j < j_count; j += kTile) {
      WeightRows& part = weights[j / kTile];
      // Fewer than 16 rows are no tile: they are multiplied where they lie.
      const int64_t copied = j_count - j < kTile ? 0 : args.K;
      part.set(qweight + j * args.qweight_stride, args.qweight_stride, copied);
    }
    for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
      const int64_t blocks = rows - i0 > kTile ? 2 : 1;
      multiply_block(weights, tokens + (m0 + i0) / kLanes * block_size, block_size, blocks, j_count, args.K,
                     acc);
      for (int64_t i = i0; i < rows && i < i0 + kBlock; i += kLanes) {
        const int64_t m_count = rows - i < kLanes ? rows - i : kLanes;
        for (int64_t j = 0; j < j_count; j += kCols) {
          store_block(args, m0 + i, m_count, n0 + j0 + j, j_count - j < kCols ? j_count - j : kCols,
                      acc + j * kAccStride + (i - i0), kAccStride, offset + j);
        }
      }
    }
  }
  _tile_release();
}

}  // namespace dtm_fast
