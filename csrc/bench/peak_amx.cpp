#include <immintrin.h>

#include <cstring>

#include "peak_loops.h"

namespace dtm_fast::bench {
namespace {

// Intel SDM vol. 2, LDTILECFG: palette 1, every tile 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns_in_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 2 x 2 accumulators (tiles 0-3) of two tiles of each side (4, 5 and 6, 7): all eight tiles.
void start(const void* operands) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const auto* p = static_cast<const char*>(operands);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, p, 64);
  _tile_loadd(5, p + 1024, 64);
  _tile_loadd(6, p + 2048, 64);
  _tile_loadd(7, p + 3072, 64);
}

template <typename T>
double finish() {
  alignas(64) T out[4][256];
  _tile_stored(0, out[0], 64);
  _tile_stored(1, out[1], 64);
  _tile_stored(2, out[2], 64);
  _tile_stored(3, out[3], 64);
  _tile_release();
  double total = 0;
  for (auto& tile : out) {
    for (T each : tile) total += each;
  }
  return total;
}

}  // namespace

double dot_int8_amx(int64_t iterations, const float* seed) {
  start(seed);
  for (int64_t n = 0; n < iterations; ++n) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  return finish<int32_t>();
}

double dot_bf16_amx(int64_t iterations, const float* seed) {
  // The upper half of a float is a bfloat16.
  alignas(64) uint16_t operands[2048];
  for (int i = 0; i < 2048; ++i) {
    uint32_t bits;
    std::memcpy(&bits, seed + i % 1024, sizeof bits);
    operands[i] = static_cast<uint16_t>(bits >> 16);
  }
  start(operands);
  for (int64_t n = 0; n < iterations; ++n) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return finish<float>();
}

}  // namespace dtm_fast::bench
