// What the kernels for few tokens that stream the weight through shared memory share: compute capability 9.0.
//
// One block on each multiprocessor owns a range of rows, and each of its warps a range of K: of every tile of
// 16 rows a warp multiplies its part, and the block adds up the parts. A warp fills its own ring of stages
// with the tensor memory accelerator, as soon as it has read one: so memory is asked for from the first
// instruction to the last, across the ends of tiles, and no warp waits for another but once a tile. The
// tokens stay in shared memory all the time.
//
// A line is 128 bytes of K of one row. Its 16-byte chunks are permuted by the TMA, chunk ^ (line mod 8), the
// line counted from an address that is a multiple of 1024 (CUDA programming guide, "TMA Swizzle"). Lane
// 4 g + t reads chunks 2 t and 2 t + 1 of line g, which meets every bank once; that it calls these its own k
// is as good as any other order (few_tokens.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "few_tokens.h"
#include "hopper.cuh"

namespace dtm_fast {
namespace few_stream {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kLineBytes = 128;
constexpr int kGroup = 8;  // rows are given to blocks by so many; a tile is two groups, the last maybe one
constexpr int kTileBytes = few_tokens::kRowTile * kLineBytes;
constexpr int kMaskBytes = 16;  // of a row of a mask in one stage: the TMA copies no less
constexpr int kPatternBytes = 1024;

// kLines: lines of a row in one stage; kVariants: masks that come with it; kTokenTiles: tiles of 8 tokens.
template <int kLines_, int kVariants_, int kTokenTiles_>
struct Shape {
  static constexpr int kLines = kLines_, kVariants = kVariants_, kTokenTiles = kTokenTiles_;
  static constexpr int kWeightBytes = kLines * kTileBytes;
  static constexpr int kMasksBytes = kVariants * few_tokens::kRowTile * kMaskBytes;
  static constexpr int kSums =  // of one warp
      kTokenTiles * few_tokens::kTokenTile * few_tokens::kSumStride<few_tokens::kRowTile>;
};

// How the work and the shared memory are divided.
struct Plan {
  int units;        // of K: one of each row of a tile is a stage
  int groups;       // of rows
  int stages;       // of each warp
  int token_bytes;  // of all tokens
  int shared_bytes;
};

template <typename S>
Plan make_plan(int64_t M, int64_t N, int64_t row_bytes, int shared_limit) {
  constexpr int kUnitBytes = S::kLines * kLineBytes;
  constexpr int kStageBytes = kWarps * (S::kWeightBytes + S::kMasksBytes + 8);
  constexpr int64_t kSumBytes = kWarps * S::kSums * 4;
  const int64_t units = (row_bytes + kUnitBytes - 1) / kUnitBytes;
  const int64_t token_bytes = units * kUnitBytes * M;
  const int64_t fixed = kPatternBytes + token_bytes + kSumBytes + kWarps * 8;
  const int64_t stages = std::max<int64_t>(0, shared_limit - fixed) / kStageBytes;
  Plan plan = {};
  if (stages == 0) return plan;
  plan.units = static_cast<int>(units);
  plan.groups = static_cast<int>((N + kGroup - 1) / kGroup);
  plan.stages = static_cast<int>(stages);
  plan.token_bytes = static_cast<int>(token_bytes);
  plan.shared_bytes = static_cast<int>(fixed + stages * kStageBytes);
  return plan;
}

// --- Instructions ---

// For what is read once.
__device__ inline uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void load_tile_once(uint32_t tile, const CUtensorMap& map, int k, int row, uint32_t barrier,
                                      uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(tile),
      "l"(&map), "r"(k), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// The masks' bytes from byte on, of 16 rows and all variants of the map.
__device__ inline void load_masks_once(uint32_t masks, const CUtensorMap& map, int byte, int row,
                                       uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(masks),
      "l"(&map), "r"(byte), "r"(row), "r"(0), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ inline void fence_before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ uint4 load_chunk(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_pair(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  return value;
}

// Asked for here, long before its use; nobody writes it while the kernel runs.
__device__ __forceinline__ float load_early(const float* from) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
  return value;
}

// --- The ring of one warp ---

struct Maps {
  CUtensorMap tile, group;  // 16 and 8 rows of the weight
  CUtensorMap tokens;       // all of them
  CUtensorMap masks;        // 16 rows of all variants
};

template <typename S>
struct Stream {
  const Maps& maps;
  int line_entries;  // of K, in a line
  int lane;
  int stages;
  uint32_t weights, masks, tokens, barriers;  // in shared memory; tokens of the block, the others of the warp
  uint8_t* sums;                              // of the block
  int first_unit, units;                      // of K, of this warp
  int first_row, end_row, tiles;              // of this block
  bool last_is_group;                         // the last tile has but one group of rows
  int next_tile = 0, next_unit = 0;           // to be asked for
  int stage = 0;
  uint32_t parity = 0;
  uint64_t policy = 0;

  __device__ Stream(uint8_t* shared, const Maps& maps_, const Plan& plan, int line_entries_)
      : maps(maps_), line_entries(line_entries_), lane(threadIdx.x % 32), stages(plan.stages) {
    const int warp = threadIdx.x / 32;
    const uint32_t unaligned = hopper::shared_address(shared);
    const uint32_t base = (unaligned + kPatternBytes - 1) / kPatternBytes * kPatternBytes;
    weights = base + warp * stages * S::kWeightBytes;
    tokens = base + kWarps * stages * S::kWeightBytes;
    const uint32_t all_masks = tokens + plan.token_bytes;
    masks = all_masks + warp * stages * S::kMasksBytes;
    const uint32_t all_sums = all_masks + kWarps * stages * S::kMasksBytes;
    sums = shared + (all_sums - unaligned);
    barriers = all_sums + kWarps * S::kSums * 4 + warp * (stages + 1) * 8;

    first_unit = static_cast<int>(int64_t{plan.units} * warp / kWarps);
    units = static_cast<int>(int64_t{plan.units} * (warp + 1) / kWarps) - first_unit;
    const int block = blockIdx.x, share = plan.groups / gridDim.x, larger = plan.groups % gridDim.x;
    const int groups = share + (block < larger ? 1 : 0);
    first_row = (block * share + min(block, larger)) * kGroup;
    end_row = first_row + groups * kGroup;
    tiles = (groups + 1) / 2;
    last_is_group = groups % 2 != 0;
    next_tile = units == 0 ? tiles : 0;

    if (lane == 0) {
      hopper::init_barrier(token_barrier(), 1);
      policy = evict_first_policy();
    }
  }

  __device__ uint32_t token_barrier() const { return barriers + 8 * stages; }

  // By lane 0: asks for the next stage.
  __device__ void fill(int to) {
    if (next_tile == tiles) return;
    const uint32_t barrier = barriers + 8 * to;
    const bool group = last_is_group && next_tile == tiles - 1;
    const int row = first_row + next_tile * few_tokens::kRowTile;
    const int line = (first_unit + next_unit) * S::kLines;
    hopper::arrive_expecting_bytes(barrier, (group ? S::kWeightBytes / 2 : S::kWeightBytes) + S::kMasksBytes);
    const CUtensorMap& map = group ? maps.group : maps.tile;
#pragma unroll
    for (int i = 0; i < S::kLines; ++i)
      load_tile_once(weights + to * S::kWeightBytes + i * kTileBytes, map, (line + i) * line_entries, row,
                     barrier, policy);
    if constexpr (S::kVariants > 0)
      load_masks_once(masks + to * S::kMasksBytes, maps.masks, (first_unit + next_unit) * kMaskBytes, row,
                      barrier, policy);
    if (++next_unit == units) {
      next_unit = 0;
      ++next_tile;
    }
  }

  // Asks for as much as the ring holds. Every barrier is made just before its first use, for the first
  // request to leave early.
  __device__ void fill_all() {
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < stages; ++i) {
        hopper::init_barrier(barriers + 8 * i, 1);
        fence_before_copies();
        fill(i);
      }
    }
    __syncwarp();
  }

  // Asks for the part of the M tokens that this warp multiplies. Every block begins at another line: all of
  // them read the same.
  __device__ void load_tokens(int M) {
    if (lane != 0 || units == 0) return;
    const int begin = first_unit * S::kLines, lines = units * S::kLines;
    fence_before_copies();
    hopper::arrive_expecting_bytes(token_barrier(), lines * M * kLineBytes);
    int next = static_cast<int>(blockIdx.x) % lines;
#pragma unroll 1
    for (int i = 0; i < lines; ++i) {
      const int line = begin + next;
      hopper::load_tile(tokens + line * M * kLineBytes, maps.tokens, line * line_entries, 0, token_barrier());
      if (++next == lines) next = 0;
    }
  }
  __device__ void wait_for_tokens() const {
    __syncwarp();
    if (units > 0) hopper::wait_barrier(token_barrier(), 0);
  }

  __device__ void wait() const { hopper::wait_barrier(barriers + 8 * stage, parity); }

  // After the products: what was read from this stage has arrived in registers, so it can be filled again.
  __device__ void next() {
    __syncwarp();
    if (lane == 0) fill(stage);
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // Chunk 2 t of row g of the tile of this line; row g + 8 is kTileBytes / 2 behind, chunk 2 t + 1 at ^ 16.
  __device__ uint32_t weight_chunk(int line) const {
    const int g = lane / 4, t = lane % 4;
    return weights + stage * S::kWeightBytes + line * kTileBytes + g * kLineBytes + ((2 * t) ^ g) * 16;
  }
  // Chunk 2 t of this token, in the unit-th unit of this warp.
  __device__ uint32_t token_chunk(int unit, int line, int token, int M) const {
    const int t = lane % 4, row = ((first_unit + unit) * S::kLines + line) * M + token;
    return tokens + row * kLineBytes + ((2 * t) ^ (row % 8)) * 16;
  }
  // Two bytes, for chunks 2 t and 2 t + 1 of row g; row g + 8 is 8 * kMaskBytes behind.
  __device__ uint32_t mask_pair(int variant, int line) const {
    const int g = lane / 4, t = lane % 4;
    return masks + stage * S::kMasksBytes + (variant * few_tokens::kRowTile + g) * kMaskBytes + line * 8 +
           2 * t;
  }
};

}  // namespace few_stream
}  // namespace dtm_fast
