// What the kernels for few tokens that stream the weight through shared memory share: compute capability 9.0.
//
// One block on each multiprocessor owns a range of rows, and each of its warps a range of K: of every tile of
// 16 rows a warp multiplies its part, and the block adds up the parts. A warp fills its own ring of stages
// with the tensor memory accelerator, as soon as it has read one: so memory is asked for from the first
// instruction to the last, across the ends of tiles, and no warp waits for another but once a tile. The
// tokens stay in shared memory all the time: of all K, or, where that is too much, of one chunk of K after
// the other; a block takes a chunk through all its rows before the next, whose tokens arrive while the last
// tile of rows gives up their places.
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
  int chunks;       // of K
  int token_units;  // of K, that a warp has of a chunk at most
  int groups;       // of rows
  int stages;       // of each warp
  int token_bytes;  // of all tokens
  int partial_bytes;
  int shared_bytes;
};

struct Range {
  int first, count;
};

__host__ __device__ inline Range part_of(Range all, int parts, int i) {
  const int begin = static_cast<int>(int64_t{all.count} * i / parts);
  return {all.first + begin, static_cast<int>(int64_t{all.count} * (i + 1) / parts) - begin};
}

// Of K, what a warp multiplies of a chunk.
__host__ __device__ inline Range units_of(int units, int chunks, int chunk, int warp) {
  return part_of(part_of({0, units}, chunks, chunk), kWarps, warp);
}

constexpr int kMostChunks = 16;

// Without stages, if there is no room for one, or a warp would have nothing to do in a chunk.
template <typename S>
Plan make_plan(int64_t M, int64_t N, int64_t row_bytes, int shared_limit, int chunks) {
  constexpr int kUnitBytes = S::kLines * kLineBytes;
  constexpr int kStageBytes = kWarps * (S::kWeightBytes + S::kMasksBytes + 8);
  constexpr int64_t kSumBytes = kWarps * S::kSums * 4;
  const int64_t units = (row_bytes + kUnitBytes - 1) / kUnitBytes;
  const int64_t groups = (N + kGroup - 1) / kGroup;
  int64_t token_units = 0, partial_bytes = 0;
  if (chunks > 1) {
    for (int chunk = 0; chunk < chunks; ++chunk)
      for (int warp = 0; warp < kWarps; ++warp)
        token_units =
            std::max<int64_t>(token_units, units_of(static_cast<int>(units), chunks, chunk, warp).count);
    const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(multiprocessors(), groups));
    const int64_t tiles = ((groups + blocks - 1) / blocks + 1) / 2;
    partial_bytes = std::max(1, S::kVariants) * tiles * kThreads * 4;
  }
  const int64_t token_bytes = (chunks > 1 ? kWarps * token_units : units) * kUnitBytes * M;
  const int64_t fixed = kPatternBytes + token_bytes + kSumBytes + partial_bytes + kWarps * 8;
  const int64_t stages = std::max<int64_t>(0, shared_limit - fixed) / kStageBytes;
  Plan plan = {};
  if (stages == 0 || (chunks > 1 && units / chunks < kWarps)) return plan;
  plan.units = static_cast<int>(units);
  plan.chunks = chunks;
  plan.token_units = static_cast<int>(token_units);
  plan.partial_bytes = static_cast<int>(partial_bytes);
  plan.groups = static_cast<int>(groups);
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

__device__ __forceinline__ void store_word(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
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
  int all_units, chunks, token_units;
  uint32_t weights, masks, tokens, barriers;  // in shared memory; tokens of the block, the others of the warp
  uint8_t *sums, *partials;                   // of the block
  int chunk = 0, first_unit, units;           // of K, of this warp, being multiplied
  int first_row, end_row, tiles;              // of this block
  bool last_is_group;                         // the last tile has but one group of rows
  int next_chunk = 0, next_first, next_units;  // to be asked for
  int next_tile = 0, next_unit = 0;
  int stage = 0;
  uint32_t parity = 0;
  uint64_t policy = 0;

  __device__ Stream(uint8_t* shared, const Maps& maps_, const Plan& plan, int line_entries_)
      : maps(maps_),
        line_entries(line_entries_),
        lane(threadIdx.x % 32),
        stages(plan.stages),
        all_units(plan.units),
        chunks(plan.chunks),
        token_units(plan.token_units) {
    const int warp = threadIdx.x / 32;
    const uint32_t unaligned = hopper::shared_address(shared);
    const uint32_t base = (unaligned + kPatternBytes - 1) / kPatternBytes * kPatternBytes;
    weights = base + warp * stages * S::kWeightBytes;
    tokens = base + kWarps * stages * S::kWeightBytes;
    const uint32_t all_masks = tokens + plan.token_bytes;
    masks = all_masks + warp * stages * S::kMasksBytes;
    const uint32_t all_sums = all_masks + kWarps * stages * S::kMasksBytes;
    sums = shared + (all_sums - unaligned);
    partials = sums + kWarps * S::kSums * 4;
    barriers = all_sums + kWarps * S::kSums * 4 + plan.partial_bytes + warp * (stages + 1) * 8;

    enter(0);
    next_first = first_unit;
    next_units = units;
    const int block = blockIdx.x, share = plan.groups / gridDim.x, larger = plan.groups % gridDim.x;
    const int groups = share + (block < larger ? 1 : 0);
    first_row = (block * share + min(block, larger)) * kGroup;
    end_row = first_row + groups * kGroup;
    tiles = (groups + 1) / 2;
    last_is_group = groups % 2 != 0;
    if (units == 0) next_chunk = chunks;

    if (lane == 0) {
      hopper::init_barrier(token_barrier(), 1);
      policy = evict_first_policy();
    }
  }

  __device__ Range units_in(int of_chunk) const {
    return units_of(all_units, chunks, of_chunk, static_cast<int>(threadIdx.x) / 32);
  }
  __device__ void enter(int of_chunk) {
    chunk = of_chunk;
    const Range range = units_in(chunk);
    first_unit = range.first;
    units = range.count;
  }
  __device__ bool is_last_chunk() const { return chunk + 1 == chunks; }

  __device__ uint32_t token_barrier() const { return barriers + 8 * stages; }

  // By lane 0: asks for the next stage.
  __device__ void fill(int to) {
    if (next_chunk == chunks) return;
    const uint32_t barrier = barriers + 8 * to;
    const bool group = last_is_group && next_tile == tiles - 1;
    const int row = first_row + next_tile * few_tokens::kRowTile;
    const int line = (next_first + next_unit) * S::kLines;
    hopper::arrive_expecting_bytes(barrier, (group ? S::kWeightBytes / 2 : S::kWeightBytes) + S::kMasksBytes);
    const CUtensorMap& map = group ? maps.group : maps.tile;
#pragma unroll
    for (int i = 0; i < S::kLines; ++i)
      load_tile_once(weights + to * S::kWeightBytes + i * kTileBytes, map, (line + i) * line_entries, row,
                     barrier, policy);
    if constexpr (S::kVariants > 0)
      load_masks_once(masks + to * S::kMasksBytes, maps.masks, (next_first + next_unit) * kMaskBytes, row,
                      barrier, policy);
    if (++next_unit < next_units) return;
    next_unit = 0;
    if (++next_tile < tiles) return;
    next_tile = 0;
    if (++next_chunk == chunks) return;
    const Range range = units_in(next_chunk);
    next_first = range.first;
    next_units = range.count;
  }

  // Before fill_all, which so needs no fence: that would wait for all that the thread has asked for.
  __device__ void make_barriers() {
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < stages; ++i) hopper::init_barrier(barriers + 8 * i, 1);
      fence_before_copies();
    }
  }

  // Asks for as much as the ring holds.
  __device__ void fill_all() {
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < stages; ++i) fill(i);
    }
    __syncwarp();
  }

  // Where this warp's tokens begin, in units.
  __device__ int token_place() const {
    return chunks == 1 ? first_unit : static_cast<int>(threadIdx.x) / 32 * token_units;
  }

  // Asks for the part of the M tokens that this warp multiplies first. Every block begins at another line:
  // all of them read the same.
  __device__ void load_tokens(int M) {
    if (lane != 0 || units == 0) return;
    const int begin = first_unit * S::kLines, lines = units * S::kLines;
    fence_before_copies();
    hopper::arrive_expecting_bytes(token_barrier(), lines * M * kLineBytes);
    int next = static_cast<int>(blockIdx.x) % lines;
#pragma unroll 1
    for (int i = 0; i < lines; ++i) {
      const int place = token_place() * S::kLines + next;
      hopper::load_tile(tokens + place * M * kLineBytes, maps.tokens, (begin + next) * line_entries, 0,
                        token_barrier());
      if (++next == lines) next = 0;
    }
  }
  __device__ void wait_for_tokens() const {
    __syncwarp();
    if (units > 0) hopper::wait_barrier(token_barrier(), chunk % 2);
  }

  // After next(), in the last tile of a chunk: asks for tokens of the next chunk in place of this unit's,
  // which no other tile needs.
  __device__ void replace_tokens(int unit, int M) {
    if (lane != 0) return;
    const Range to = units_in(chunk + 1);
    if (unit == 0) hopper::arrive_expecting_bytes(token_barrier(), to.count * S::kLines * M * kLineBytes);
    fence_before_copies();
    const int end = (unit + 1 < units ? min(unit + 1, to.count) : to.count) * S::kLines;
#pragma unroll 1
    for (int i = unit * S::kLines; i < end; ++i)
      hopper::load_tile(tokens + (token_place() * S::kLines + i) * M * kLineBytes, maps.tokens,
                        (to.first * S::kLines + i) * line_entries, 0, token_barrier());
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
    const int t = lane % 4, row = ((token_place() + unit) * S::kLines + line) * M + token;
    return tokens + row * kLineBytes + ((2 * t) ^ (row % 8)) * 16;
  }
  // This byte of a row of tokens.
  __device__ uint32_t token_byte(int k, int token, int M) const {
    const int row = k / kLineBytes * M + token;
    return tokens + row * kLineBytes + ((k / 16 % 8) ^ (row % 8)) * 16 + k % 16;
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
