// What the kernels for compute capability 9.0 share: barriers in shared memory, the tensor memory accelerator
// (TMA), a ring of operand tiles between one producing warp and two multiplying warpgroups, and the order of
// the tiles. Instructions: PTX ISA, "Asynchronous Barrier", "Tensor copy", "Asynchronous Warpgroup Level
// Matrix Instructions".
#pragma once

#include <cuda.h>

#include <cstdint>

#include "hopper_wgmma.cuh"

namespace dtm_fast {
namespace hopper {

constexpr int kThreads = 384;         // one warpgroup that loads, two that multiply
constexpr int kMultiplyingWarps = 8;  // warps of the latter
constexpr int kRowsA = 128;           // rows of a tile of A: 64 for each multiplying warpgroup
constexpr int kRowBytes = 128;        // bytes of K in a tile: what one swizzle pattern spans
constexpr int kLoadRegisters = 40,
              kMultiplyRegisters = 232;  // 40 + 2 * 232 = 3 * 168, what the launch bounds give

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Barriers. A wait names the parity of the phase whose end it awaits; the phase before the first has
// parity 1. ---

__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the cluster and to the copy engine, once a cluster_sync has followed.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive_expecting_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier at this address in the shared memory of another block of the cluster, or of this
// one.
__device__ inline void arrive_at_rank(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ inline void wait_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

__device__ inline void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The 128 threads of a multiplying warpgroup, 0 or 1. Barrier 0 is that of __syncthreads.
__device__ inline void group_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for what the kernel before this one in the stream wrote; nothing to wait for after an ordinary
// launch.
__device__ inline void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// --- Copies, from element k and the row on. What lies outside the tensor arrives as zeros, and counts. ---

__device__ inline void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ inline void load_tile(uint32_t tile, const CUtensorMap& map, int k, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(tile),
      "l"(&map), "r"(k), "r"(row), "r"(barrier)
      : "memory");
}

// The same tile to the same address, and its bytes to the same barrier, in every block of the cluster named
// by ranks.
__device__ inline void load_tile_to_ranks(uint32_t tile, const CUtensorMap& map, int k, int row,
                                          uint32_t barrier, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, "
      "{%2, %3}], [%4], %5;" ::"r"(tile),
      "l"(&map), "r"(k), "r"(row), "r"(barrier), "h"(ranks)
      : "memory");
}

// --- Registers ---

template <int kRegisters>
__device__ inline void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- The ring ---

struct Position {
  int stage = 0;
  uint32_t parity = 0;
};

// Stages of [A tile | B tile | extra bytes] in shared memory, each with a barrier "full" and a barrier
// "empty".
//
// A cluster is one block, or two that work on neighbouring tiles of A and the same tile of B: each then loads
// its half of B for both. So a stage is empty once the multiplying warps of all blocks of the cluster have
// left it, and full once all bytes are in, wherever they came from. Bytes may come before this block has
// announced that it expects them, but not before it has left the stage. Extra bytes are the block's own, and
// are copied by its own warp: that they are read no more is told by a third barrier, for which no other block
// is waited.
template <int kRowsB, int kRingStages, int kExtraBytes = 0, int kExtraArrivals = 0>
struct Ring {
  static constexpr int kStages = kRingStages;
  static constexpr int kBytesA = kRowsA * kRowBytes, kBytesB = kRowsB * kRowBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB + kExtraBytes;
  static constexpr int kPatternBytes = 1024;  // 8 rows: tiles begin where a swizzle pattern does
  static constexpr int kSharedBytes = kPatternBytes + kStages * (kStageBytes + (kExtraBytes > 0 ? 3 : 2) * 8);
  static_assert(kStageBytes % kPatternBytes == 0 && kBytesB % (2 * kPatternBytes) == 0,
                "tiles start on a pattern");
  static_assert(kSharedBytes <= 227 * 1024, "what a block may have");

  uint32_t tiles, barriers;

  // shared: kSharedBytes at the same address in every block.
  __device__ explicit Ring(const void* shared)
      : tiles((shared_address(shared) + kPatternBytes - 1) / kPatternBytes * kPatternBytes),
        barriers(tiles + kStages * kStageBytes) {}

  __device__ uint32_t a(int stage) const { return tiles + stage * kStageBytes; }
  __device__ uint32_t b(int stage) const { return a(stage) + kBytesA; }
  __device__ uint32_t extra(int stage) const { return b(stage) + kBytesB; }
  __device__ uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
  __device__ uint32_t extra_empty(int stage) const { return barriers + 16 * kStages + 8 * stage; }

  // By all threads, before anything else; blocks is the size of the cluster.
  __device__ void start(int blocks) const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        init_barrier(full(stage), 1 + kExtraArrivals);
        init_barrier(empty(stage), kMultiplyingWarps * blocks);
        if (kExtraBytes > 0) init_barrier(extra_empty(stage), kMultiplyingWarps);
      }
      fence_barrier_init();
    }
    cluster_sync();
  }

  static __device__ void advance(Position& position) {
    if (++position.stage == kStages) {
      position.stage = 0;
      position.parity ^= 1;
    }
  }

  __device__ void wait_full(const Position& position) const {
    wait_barrier(full(position.stage), position.parity);
  }
  __device__ void wait_empty(const Position& position) const {
    wait_barrier(empty(position.stage), position.parity ^ 1);
  }
  __device__ void wait_extra_empty(const Position& position) const {
    wait_barrier(extra_empty(position.stage), position.parity ^ 1);
  }

  // By every multiplying warp, when it reads no more of the stage.
  __device__ void leave(int stage, int blocks) const {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if (kExtraBytes > 0 && lane == 0) arrive(extra_empty(stage));
    if (lane < blocks) arrive_at_rank(empty(stage), lane);
  }

  // By the producing thread: rows row_a.. of A, and the cluster's rows row_b.. of B, from element k on.
  __device__ void load(const Position& position, const CUtensorMap& map_a, const CUtensorMap& map_b, int k,
                       int row_a, int row_b, int blocks, int rank) const {
    wait_empty(position);
    const uint32_t barrier = full(position.stage);
    arrive_expecting_bytes(barrier, kBytesA + kBytesB);
    load_tile(a(position.stage), map_a, k, row_a, barrier);
    if (blocks == 1)
      load_tile(b(position.stage), map_b, k, row_b, barrier);
    else
      load_tile_to_ranks(b(position.stage) + rank * (kBytesB / 2), map_b, k, row_b + rank * (kRowsB / 2),
                         barrier, 0b11);
  }
};

// Adds to sums the products of 64 rows of A (those of this multiplying warpgroup, 0 or 1) and the rows of B,
// over steps stages of the ring. The tensor cores always have the next stage's products queued.
template <typename R, typename T, int kSums>
__device__ __forceinline__ void multiply(const R& ring, Position& position, int steps, int group, int blocks,
                                         T (&sums)[kSums]) {
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    ring.wait_full(position);
    const uint64_t a = tile_descriptor(ring.a(position.stage) + group * 64 * kRowBytes);
    const uint64_t b = tile_descriptor(ring.b(position.stage));
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < kRowBytes / kWgmmaBytes; ++part)
      wgmma(sums, a + part * kDescriptorStep, b + part * kDescriptorStep, step > 0 || part > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0) ring.leave(previous, blocks);
    previous = position.stage;
    R::advance(position);
  }
  wgmma_wait<0>();
  hold(sums);
  ring.leave(previous, blocks);
}

// --- The order of the tiles ---

// Clusters take tiles in turn. Neighbours in time share: within a band of kBand cluster-high rows of tiles, A
// goes fastest, so that the blocks that run at once read few tiles of either operand, and find them in L2.
struct TileOrder {
  static constexpr int kBand = 8;
  int blocks;          // of a cluster
  int rows_a, rows_b;  // clusters of tiles of A, and tiles of B

  __device__ int count() const { return rows_a * rows_b; }

  // The index-th tile of A for the block of this rank, and of B.
  __device__ void at(int index, int rank, int& tile_a, int& tile_b) const {
    const int band = index / (kBand * rows_b), first = band * kBand;
    const int height = min(kBand, rows_a - first), within = index - first * rows_b;
    tile_a = (first + within % height) * blocks + rank;
    tile_b = within / height;
  }
};

// --- Fragments to rows ---

// Word i of thread q of a quad becomes word q of thread i: from a piece of four items in every thread to one
// item in each.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? word[i] : word[i + distance], distance);
      word[i] = upper ? other : word[i];
      word[i + distance] = upper ? word[i + distance] : other;
    }
  }
}

}  // namespace hopper
}  // namespace dtm_fast
