// The tiles of AMX (Intel 64 and IA-32 Architectures Optimization Reference Manual, "Intel Advanced Matrix
// Extensions"). Included only by files compiled for it; everything is in an anonymous namespace, so that no
// copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dtm_fast {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;

// GCC's tile intrinsics do not say that they read memory: what they read must be in memory before them.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// While it lives, the eight tiles of this thread have 16 rows of 64 bytes each.
class WholeTiles {
 public:
  WholeTiles() {
    finish_stores();
    _tile_loadconfig(&config_);
  }
  ~WholeTiles() { _tile_release(); }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Config config_;
};

}  // namespace
}  // namespace dtm_fast
