// Tiles of a matrix in shared memory, copied ahead of the arithmetic: what the products of all types share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "mma_ptx.cuh"

namespace dtm_fast {

constexpr int kTileBytes = 64;  // of a row in one stage
constexpr int kChunkBytes = 16;
constexpr int kTileChunks = kTileBytes / kChunkBytes;

// Where a chunk of a row of a tile lies. Two rows fill the 32 banks once; exchanging chunks by bits of the
// row number lets 8 neighbouring rows be read at the same chunk, and two rows be written whole, without bank
// conflicts.
__host__ __device__ constexpr uint32_t tile_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kTileBytes + (chunk ^ ((row >> 1) & 3)) * kChunkBytes);
}

// A matrix that is summed along its rows, in bytes.
struct Operand {
  const char* data;
  int64_t stride, rows, row_bytes;
};

__host__ __device__ inline bool is_aligned(const void* data, int64_t stride, int64_t rows, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && (rows <= 1 || stride % bytes == 0);
}

__host__ __device__ constexpr int64_t tiles_of(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

// More than 2^31 tiles of a row fit into no GPU.
__host__ __device__ inline int tile_count(const Operand& matrix) {
  return static_cast<int>(tiles_of(matrix.row_bytes, kTileBytes));
}

// 16 bytes at any address, of which `bytes` exist.
__device__ inline uint4 load_bytes(const char* from, int bytes) {
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int i = 0; i < bytes; ++i) {
    const uint64_t byte = static_cast<unsigned char>(from[i]);
    if (i < 8)
      low |= byte << (8 * i);
    else
      high |= byte << (8 * (i - 8));
  }
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                    static_cast<uint32_t>(high >> 32));
}

// Copies 64 bytes of kRows rows of a matrix per tile, zeros beyond its edges. Thread t of kThreads has chunk
// t % 4 of the rows t / 4, t / 4 + kThreads / 4, ... kAligned: the rows are aligned to 16 bytes, and the
// copies are asynchronous.
template <int kRows, int kThreads, bool kAligned>
class TileCopier {
 public:
  static constexpr int kRowStep = kThreads / kTileChunks;
  static constexpr int kCopies = (kRows + kRowStep - 1) / kRowStep;
  static_assert(kRowStep % 8 == 0, "the exchange of chunks must be the same for all rows of a thread");

  __device__ TileCopier(const Operand& matrix, int64_t first_row)
      : matrix_(matrix),
        row_(static_cast<int>(threadIdx.x) / kTileChunks),
        chunk_(static_cast<int>(threadIdx.x) % kTileChunks),
        offset_(tile_offset(row_, chunk_)) {
    const int64_t rows_left = matrix.rows - first_row - row_;
    rows_left_ = static_cast<int>(rows_left < kRows - row_ ? rows_left : kRows - row_);
    from_ = matrix.data + (first_row + row_) * matrix.stride + chunk_ * kChunkBytes;
    whole_tiles_ = static_cast<int>(matrix.row_bytes / kTileBytes);
    last_bytes_ =
        min(max(static_cast<int>(matrix.row_bytes % kTileBytes) - chunk_ * kChunkBytes, 0), kChunkBytes);
  }

  __device__ int chunk() const { return chunk_; }
  __device__ int row(int copy) const { return row_ + copy * kRowStep; }
  __device__ bool has_row(int copy) const { return copy * kRowStep < rows_left_; }
  __device__ uint32_t offset(int copy) const {
    return offset_ + static_cast<uint32_t>(copy * kRowStep * kTileBytes);
  }

  // tile: of those that tile_count says of the rows.
  __device__ void copy(int tile, unsigned char* shared) const {
    const int bytes = tile < whole_tiles_ ? kChunkBytes : last_bytes_;
    const char* const from = from_ + static_cast<int64_t>(tile) * kTileBytes;
    if constexpr (kAligned) {
      const uint32_t to = shared_address(shared);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (kRows % kRowStep != 0 && row(i) >= kRows) break;
        const int size = has_row(i) ? bytes : 0;
        const char* const at = size > 0 ? from + i * kRowStep * matrix_.stride : matrix_.data;
        if (size == 0 || size == kChunkBytes)
          copy_async_16(to + offset(i), at, size);
        else  // the instruction would read all 16 bytes, of which the last may lie beyond the matrix
          *reinterpret_cast<uint4*>(shared + offset(i)) = load_bytes(at, size);
      }
    } else {
      copy_unaligned(from, bytes, shared);
    }
  }

 private:
  // Whole words, shifted into place, where they do not reach beyond the matrix; else bytes.
  __device__ void copy_unaligned(const char* from, int bytes, unsigned char* shared) const {
    const char* const last = from + (kCopies - 1) * kRowStep * matrix_.stride;
    const char* const end = matrix_.data + (matrix_.rows - 1) * matrix_.stride + matrix_.row_bytes;
    constexpr int kWordsReach = 20;  // bytes from a word boundary
    if (bytes == kChunkBytes && has_row(kCopies - 1) && from - 3 >= matrix_.data &&
        last + kWordsReach <= end) {
      uint32_t words[kCopies][5];
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const char* const at = from + i * kRowStep * matrix_.stride;
        const uint32_t* const word =
            reinterpret_cast<const uint32_t*>(reinterpret_cast<uintptr_t>(at) & ~uintptr_t{3});
#pragma unroll
        for (int w = 0; w < 5; ++w) words[i][w] = __ldg(word + w);
      }
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const char* const at = from + i * kRowStep * matrix_.stride;
        const uint32_t shift = 8 * static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at) & 3);
        *reinterpret_cast<uint4*>(shared + offset(i)) =
            make_uint4(__funnelshift_r(words[i][0], words[i][1], shift),
                       __funnelshift_r(words[i][1], words[i][2], shift),
                       __funnelshift_r(words[i][2], words[i][3], shift),
                       __funnelshift_r(words[i][3], words[i][4], shift));
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kCopies && row(i) < kRows; ++i) {
      const char* const at = from + i * kRowStep * matrix_.stride;
      *reinterpret_cast<uint4*>(shared + offset(i)) = load_bytes(at, has_row(i) ? bytes : 0);
    }
  }

  const Operand& matrix_;
  int row_, chunk_;
  uint32_t offset_;
  int rows_left_;     // from the first row of this thread on, in the tile
  const char* from_;  // its chunk of the first tile
  int whole_tiles_;
  int last_bytes_;  // of its chunk in the tile behind them
};

// Runs copy(tile, stage), which queues asynchronous copies, kStages - 1 tiles ahead of use(tile, stage).
// Before the threads meet, each calls arrived(tile, stage), and may change in shared memory what it copied
// itself. Afterwards shared memory is free for other use.
template <int kStages, typename Copy, typename Arrived, typename Use>
__device__ inline void run_pipeline(int tiles, const Copy& copy, const Arrived& arrived, const Use& use) {
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < tiles) copy(tile, tile);
    copy_async_commit();
  }
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<kStages - 2>();
    arrived(tile, stage);
    __syncthreads();  // the tile is there for all, and all are done with the one before, whose stage is next
    const int free_stage = stage == 0 ? kStages - 1 : stage - 1;
    if (tile + kStages - 1 < tiles) copy(tile + kStages - 1, free_stage);
    copy_async_commit();
    use(tile, stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  __syncthreads();
}

// Which tile of rows and of columns a block takes. Blocks that run at the same time share 16 tiles of rows
// and about as many of columns, so that the second-level cache serves most of their reads (Triton's tutorial
// on matrix multiplication calls it grouped ordering).
struct TilePlace {
  int row, col;
};

__host__ __device__ inline TilePlace place_of_tile(int64_t tile, int row_tiles, int col_tiles) {
  constexpr int kGroup = 16;
  const int64_t group_tiles = static_cast<int64_t>(kGroup) * col_tiles;
  const int first = static_cast<int>(tile / group_tiles) * kGroup;
  const int rows = row_tiles - first < kGroup ? row_tiles - first : kGroup;
  const int within = static_cast<int>(tile % group_tiles);
  return {first + within % rows, within / rows};
}

}  // namespace dtm_fast
