#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "hopper.cuh"
#include "hopper_launch.h"
#include "int8_linear.h"
#include "launch.h"
#include "tensor_map.h"

namespace dtm_fast {
namespace {

struct Output {
  const float* scale_x;
  const float* scale;
  const float* bias;
  void* y;
  int M, N;
  bool wide;  // rows of y begin on 16 bytes
};

template <int kColumns>
using Int8Ring = hopper::Ring<kColumns, kColumns == 256 ? 4 : 6>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Four blocks of eight columns, of one row: two columns of each in every thread of a quad.
struct Piece {
  float value[4][2];
};

// Writes columns n + 8 * block + 2 * (lane mod 4) + i of row m; all threads of a warp call it, also for rows
// beyond M.
template <typename T>
__device__ __forceinline__ void store(const Output& out, int m, int n, const Piece& piece) {
  const int quad = threadIdx.x % 4;
  T* row = static_cast<T*>(out.y) + static_cast<int64_t>(m) * out.N;
  if (std::is_same<T, __nv_bfloat16>::value && out.wide) {
    uint32_t word[4];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(piece.value[block][0], piece.value[block][1]);
      word[block] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    hopper::transpose_quad(word);
    const int column = n + 8 * quad;
    if (m < out.M && column < out.N)
      *reinterpret_cast<uint4*>(row + column) = make_uint4(word[0], word[1], word[2], word[3]);
    return;
  }
  if (m >= out.M) return;
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    const int column = n + 8 * block + 2 * quad;
    if (std::is_same<T, float>::value && out.wide) {
      if (column < out.N)
        *reinterpret_cast<float2*>(row + column) = make_float2(piece.value[block][0], piece.value[block][1]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (column + i < out.N) row[column + i] = static_cast<T>(piece.value[block][i]);
  }
}

#endif

// A is qx, B is qweight. Persistent: while the multiplying warpgroups write a tile, the copies for the next
// go on.
template <int kColumns, typename T>
__global__ void __launch_bounds__(hopper::kThreads, 1)
    int8_hopper_kernel(const __grid_constant__ CUtensorMap map_x,
                       const __grid_constant__ CUtensorMap map_weight, const hopper::TileOrder order,
                       const int steps, const Output out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using R = Int8Ring<kColumns>;
  extern __shared__ uint8_t shared[];
  // Twice the factors and biases of a tile's columns, for either multiplying warpgroup.
  __shared__ alignas(16) float2 columns_of_tile[2][2][kColumns];
  const R ring(shared);
  const int rank = hopper::cluster_rank();
  const int first = blockIdx.x / order.blocks, stride = gridDim.x / order.blocks;
  if (threadIdx.x == 0) {
    hopper::prefetch_tensor_map(map_x);
    hopper::prefetch_tensor_map(map_weight);
  }
  ring.start(order.blocks);
  hopper::wait_for_previous_kernel();

  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
  hopper::Position position;
  if (group < 0) {
    hopper::lower_registers<hopper::kLoadRegisters>();
    if (threadIdx.x == 0) {
      for (int index = first; index < order.count(); index += stride) {
        int tile_m, tile_n;
        order.at(index, rank, tile_m, tile_n);
        for (int step = 0; step < steps; ++step) {
          ring.load(position, map_x, map_weight, step * hopper::kRowBytes, tile_m * hopper::kRowsA,
                    tile_n * kColumns, order.blocks, rank);
          R::advance(position);
        }
      }
    }
  } else {
    hopper::raise_registers<hopper::kMultiplyRegisters>();
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, quad = lane % 4;
    int turn = 0;
    for (int index = first; index < order.count(); index += stride, turn ^= 1) {
      int tile_m, tile_n;
      order.at(index, rank, tile_m, tile_n);
      const int m0 = tile_m * hopper::kRowsA + 64 * group + 16 * (thread / 32) + lane / 4,
                n0 = tile_n * kColumns;
      // Asked for before the products, so that they are there after them. Adding -0 changes nothing.
      float2 factors[kColumns / 128];
#pragma unroll
      for (int i = 0; i < kColumns / 128; ++i) {
        const int n = min(n0 + thread + 128 * i, out.N - 1);
        factors[i] = make_float2(out.scale[n], out.bias == nullptr ? -0.0f : out.bias[n]);
      }
      float scale_x[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) scale_x[half] = out.scale_x[min(m0 + 8 * half, out.M - 1)];

      int32_t sums[kColumns / 2];
      hopper::multiply(ring, position, steps, group, order.blocks, sums);

      float2* columns = columns_of_tile[group][turn];
#pragma unroll
      for (int i = 0; i < kColumns / 128; ++i) columns[thread + 128 * i] = factors[i];
      // One barrier a tile: who writes these columns again, two tiles later, has passed the one between, and
      // so has everybody who read them.
      hopper::group_sync(group);
#pragma unroll
      for (int n = 0; n < kColumns; n += 32) {
        Piece piece[2];
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          // float4: two neighbouring columns.
          const float4 pair = *reinterpret_cast<const float4*>(&columns[n + 8 * block + 2 * quad]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int32_t sum = sums[(n / 8 + block) * 4 + 2 * half + i];
              const float scaled =
                  __fmul_rn(__int2float_rn(sum), __fmul_rn(scale_x[half], i == 0 ? pair.x : pair.z));
              piece[half].value[block][i] = __fadd_rn(scaled, i == 0 ? pair.y : pair.w);
            }
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) store<T>(out, m0 + 8 * half, n0 + n, piece[half]);
      }
    }
  }
  hopper::cluster_sync();  // a block stays while the other may write to its shared memory
#endif
}

template <int kColumns, typename T>
void launch(const Int8Linear& args, int blocks, cudaStream_t stream) {
  const int64_t tiles_m = (args.M + hopper::kRowsA - 1) / hopper::kRowsA;
  const int64_t tiles_n = (args.N + kColumns - 1) / kColumns;
  hopper::TileOrder order;
  order.blocks = blocks;
  order.rows_a = static_cast<int>((tiles_m + blocks - 1) / blocks);
  order.rows_b = static_cast<int>(tiles_n);
  const CUtensorMap map_x =
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, args.qx, args.M, args.K, args.qx_stride, 1, hopper::kRowsA);
  const CUtensorMap map_weight = tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, args.qweight, args.N, args.K,
                                            args.qweight_stride, 1, kColumns / blocks);
  Output out;
  out.scale_x = args.scale_x;
  out.scale = args.scale;
  out.bias = args.bias;
  out.y = args.y;
  out.M = static_cast<int>(args.M);
  out.N = static_cast<int>(args.N);
  out.wide = reinterpret_cast<uintptr_t>(args.y) % 16 == 0 && args.N % (16 / sizeof(T)) == 0;
  const int steps = static_cast<int>((args.K + hopper::kRowBytes - 1) / hopper::kRowBytes);
  launch_clusters(int8_hopper_kernel<kColumns, T>, "int8_linear", blocks,
                  int64_t{order.rows_a} * order.rows_b, hopper::kThreads, Int8Ring<kColumns>::kSharedBytes,
                  Int8Ring<kColumns>::kSharedBytes, /*early=*/true, stream, map_x, map_weight, order, steps,
                  out);
}

template <int kColumns>
void launch(const Int8Linear& args, int blocks, cudaStream_t stream) {
  if (args.type == FloatType::kBfloat16)
    launch<kColumns, __nv_bfloat16>(args, blocks, stream);
  else
    launch<kColumns, float>(args, blocks, stream);
}

}  // namespace

bool int8_hopper_possible(const Int8Linear& args) {
  constexpr int64_t kMostTiles = int64_t{1} << 30;
  return compute_capability() == 90 && tensor_map_possible(args.qx, args.M, args.K, args.qx_stride, 1) &&
         tensor_map_possible(args.qweight, args.N, args.K, args.qweight_stride, 1) &&
         (args.M / hopper::kRowsA + 2) * (args.N / 128 + 1) < kMostTiles;
}

void int8_hopper(const Int8Linear& args, CUstream_st* stream) {
  const int64_t tiles_m = (args.M + hopper::kRowsA - 1) / hopper::kRowsA;
  const int blocks = cluster_blocks(tiles_m);
  // Of the two widths the one whose busiest block has the fewest columns; the narrow one loads more for each.
  const int64_t wide = 256 * tiles_of_a_block(tiles_m, (args.N + 255) / 256, blocks);
  const int64_t narrow = 128 * tiles_of_a_block(tiles_m, (args.N + 127) / 128, blocks);
  if (wide * 10 <= narrow * 11)
    launch<256>(args, blocks, stream);
  else
    launch<128>(args, blocks, stream);
}

}  // namespace dtm_fast
