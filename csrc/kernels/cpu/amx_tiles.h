// The tile registers of AMX. Included only by files compiled for AMX; everything is in an anonymous
// namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dtm_fast {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;

// What tile 5 holds: tiles 0-3 hold sums, 4 weights, 6 and 7 tokens.
enum class FifthTile { kWeights, kTokens };

// Palette 1: all tiles have 16 rows of 64 bytes; of fewer bytes where sums and tokens have fewer than 16
// columns.
struct alignas(64) TileConfig {
  TileConfig(int64_t columns, FifthTile fifth) {
    for (int tile = 0; tile < 8; ++tile) {
      const bool weights = tile == 4 || (tile == 5 && fifth == FifthTile::kWeights);
      if (!weights) row_bytes[tile] = static_cast<uint16_t>(4 * columns);
    }
  }

  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// To be called between writing memory and loading it into a tile: the intrinsics of GCC 12 do not tell the
// compiler that they read memory, which may then write it later or never.
inline void finish_writes(const void* memory) { __asm__ volatile("" ::"r"(memory) : "memory"); }

// The tiles are configured while an object of this class lives.
class TilesInUse {
 public:
  explicit TilesInUse(int64_t columns = kTileRows, FifthTile fifth = FifthTile::kWeights) {
    const TileConfig config(columns, fifth);
    finish_writes(&config);
    _tile_loadconfig(&config);
  }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

}  // namespace
}  // namespace dtm_fast
