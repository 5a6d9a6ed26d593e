#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "hopper.cuh"
#include "hopper_launch.h"
#include "launch.h"
#include "masked_linear.h"
#include "tensor_map.h"

namespace dtm_fast {
namespace {

constexpr int kEntries = hopper::kRowBytes / 2;  // weights of a row in a tile
constexpr int kMaskBytes = kEntries / 8;         // and their bits
constexpr int kLanes = 32;

// A is the weight, B is x; behind them the bits of the weight's rows for each mask.
template <int kMasks, int kTokens>
using MaskedRing =
    hopper::Ring<kTokens, kTokens == 256 ? 4 : 6, kMasks * hopper::kRowsA * kMaskBytes, kLanes>;

// The masks of one launch, kMasks of them.
struct Masks {
  const uint8_t* mask;
  int64_t row_stride, variant_stride;
  int row_bytes;
  const float* bias;
  __nv_bfloat16* y;
  int M, N;
  bool wide;  // rows of y begin on 16 bytes
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// 8 bytes, or zeros.
__device__ __forceinline__ void copy_mask_bytes(uint32_t target, const uint8_t* source, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(source),
               "r"(inside ? kMaskBytes : 0)
               : "memory");
}

// The first `bytes` of them, and zeros: of the end of a row, behind which there may be no memory. The
// asynchronous copy reads all 8, however many it is to copy.
__device__ __forceinline__ void load_mask_bytes(uint32_t target, const uint8_t* source, int bytes) {
  uint64_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < bytes; ++i) bits |= uint64_t{source[i]} << (8 * i);
  asm volatile("st.shared.b64 [%0], %1;" ::"r"(target), "l"(bits) : "memory");
}

// One of the arrivals that the barrier counts on, once this thread's copies so far are done.
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

// 16 rows x 16 entries, as wgmma wants A in registers: lane l gives the address of 8 entries of row l mod 16.
__device__ __forceinline__ void load_fragment(uint32_t address, uint32_t (&a)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

// Two 16-bit masks from the top bits of byte `byte` of low and of high: prmt can repeat a byte's sign.
template <int kByte>
__device__ __forceinline__ uint32_t expand(uint32_t low, uint32_t high) {
  constexpr uint32_t kSign = 8;
  constexpr uint32_t kSelect = (kSign | kByte) * 0x11u + (kSign | (4 + kByte)) * 0x1100u;
  uint32_t mask;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(mask) : "r"(low), "r"(high), "n"(kSelect));
  return mask;
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// The masked weights of this warp's 16 rows for 32 entries of K: those of half a stage.
template <int kMasks>
struct Fragments {
  uint32_t a[kMasks][2][4];

  // weights: this lane's row of the tile; chunk: the 8 entries of it that ldmatrix wants first, before the
  // swizzle; bits: the bytes of the warp's row lane / 4 for these entries, of the first mask.
  __device__ __forceinline__ void load(uint32_t weights, int chunk, uint32_t bits) {
    const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t weight[4];
      load_fragment(weights + (((chunk + 2 * part) ^ (lane % 8)) * 16), weight);
#pragma unroll
      for (int v = 0; v < kMasks; ++v)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[v][part][i] = weight[i];
    }
#pragma unroll
    for (int v = 0; v < kMasks; ++v) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A thread's pairs of entries begin at 2 * quad of each 8: one byte, whose bits go to the top of it.
        const uint32_t word = load_word(bits + (v * hopper::kRowsA + 8 * half) * kMaskBytes);
        const uint32_t low = word << (7 - 2 * quad), high = word << (6 - 2 * quad);
        a[v][0][half] &= expand<0>(low, high);
        a[v][0][2 + half] &= expand<1>(low, high);
        a[v][1][half] &= expand<2>(low, high);
        a[v][1][2 + half] &= expand<3>(low, high);
      }
    }
  }

  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int v = 0; v < kMasks; ++v)
#pragma unroll
      for (int part = 0; part < 2; ++part) hopper::hold(a[v][part]);
  }
};

// sums += fragments * x of half a stage, begun; tokens: descriptor of its first 16 entries of x.
template <int kMasks, int kSums>
__device__ __forceinline__ void begin_products(float (&sums)[kMasks][kSums],
                                               const Fragments<kMasks>& fragments, uint64_t tokens,
                                               bool accumulate) {
  hopper::wgmma_fence();
#pragma unroll
  for (int part = 0; part < 2; ++part)
#pragma unroll
    for (int v = 0; v < kMasks; ++v)
      hopper::wgmma(sums[v], fragments.a[v][part], tokens + part * hopper::kDescriptorStep,
                    accumulate || part > 0);
  hopper::wgmma_commit();
}

// Sums of 64 rows n of the weight and of the tile's tokens m to y[m, n]; all threads of a warp call it.
template <int kSums>
__device__ __forceinline__ void store(const Masks& out, __nv_bfloat16* y, int m0, int n0,
                                      const float (&sums)[kSums], const float (&bias)[2]) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
  for (int j = 0; j < kSums / 4; j += 2) {  // two times 8 tokens
    uint32_t word[4];                       // [tokens 8j.. or 8j + 8.., rows n0.. or n0 + 8..]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* sum = &sums[4 * (j + i / 2) + 2 * (i % 2)];
      const __nv_bfloat162 pair = __floats2bfloat162_rn(sum[0] + bias[i % 2], sum[1] + bias[i % 2]);
      word[i] = transpose_8x8(*reinterpret_cast<const uint32_t*>(&pair));
    }
    if (out.wide) {
      hopper::transpose_quad(word);
      const int m = m0 + 8 * (j + quad / 2) + lane / 4, n = n0 + 8 * (quad % 2);
      if (m < out.M && n < out.N)
        *reinterpret_cast<uint4*>(y + static_cast<int64_t>(m) * out.N + n) =
            make_uint4(word[0], word[1], word[2], word[3]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = m0 + 8 * (j + i / 2) + lane / 4, n = n0 + 8 * (i % 2) + 2 * quad;
      const __nv_bfloat162 pair = *reinterpret_cast<const __nv_bfloat162*>(&word[i]);
      if (m < out.M && n < out.N) y[static_cast<int64_t>(m) * out.N + n] = pair.x;
      if (m < out.M && n + 1 < out.N) y[static_cast<int64_t>(m) * out.N + n + 1] = pair.y;
    }
  }
}

#endif

// Computes the tiles of y transposed, so that the weight is the operand that wgmma takes from registers,
// where it can be masked; only then the tensor cores need no copy of it for each mask. A warp copies the bits
// of the mask.
template <int kMasks, int kTokens>
__global__ void __launch_bounds__(hopper::kThreads, 1)
    masked_hopper_kernel(const __grid_constant__ CUtensorMap map_weight,
                         const __grid_constant__ CUtensorMap map_x, const hopper::TileOrder order,
                         const int steps, const Masks out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using R = MaskedRing<kMasks, kTokens>;
  extern __shared__ uint8_t shared[];
  const R ring(shared);
  const int rank = hopper::cluster_rank();
  const int first = blockIdx.x / order.blocks, stride = gridDim.x / order.blocks;
  if (threadIdx.x == 0) {
    hopper::prefetch_tensor_map(map_weight);
    hopper::prefetch_tensor_map(map_x);
  }
  ring.start(order.blocks);

  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
  hopper::Position position;
  if (group < 0) {
    hopper::lower_registers<hopper::kLoadRegisters>();
    if (threadIdx.x == 0) {
      for (int index = first; index < order.count(); index += stride) {
        int tile_n, tile_m;
        order.at(index, rank, tile_n, tile_m);
        for (int step = 0; step < steps; ++step) {
          ring.load(position, map_weight, map_x, step * kEntries, tile_n * hopper::kRowsA, tile_m * kTokens,
                    order.blocks, rank);
          R::advance(position);
        }
      }
    } else if (warp == 1) {
      for (int index = first; index < order.count(); index += stride) {
        int tile_n, tile_m;
        order.at(index, rank, tile_n, tile_m);
        const int n0 = tile_n * hopper::kRowsA + lane;
        for (int step = 0; step < steps; ++step) {
          ring.wait_extra_empty(position);
          const int bytes = min(kMaskBytes, out.row_bytes - step * kMaskBytes);
          const uint32_t target = ring.extra(position.stage) + lane * kMaskBytes;
          if (bytes == kMaskBytes) {
#pragma unroll
            for (int i = 0; i < hopper::kRowsA; i += kLanes) {
              const bool inside = n0 + i < out.N;
              const uint8_t* row = out.mask + (inside ? n0 + i : 0) * out.row_stride + step * kMaskBytes;
#pragma unroll
              for (int v = 0; v < kMasks; ++v)
                copy_mask_bytes(target + (v * hopper::kRowsA + i) * kMaskBytes, row + v * out.variant_stride,
                                inside);
            }
            arrive_after_copies(ring.full(position.stage));
          } else {
#pragma unroll 1
            for (int i = 0; i < kMasks * hopper::kRowsA; i += kLanes) {
              const int n = n0 + i % hopper::kRowsA, v = i / hopper::kRowsA;
              const uint8_t* row = out.mask + v * out.variant_stride + n * out.row_stride + step * kMaskBytes;
              load_mask_bytes(target + i * kMaskBytes, row, n < out.N ? bytes : 0);
            }
            hopper::arrive(ring.full(position.stage));
          }
          R::advance(position);
        }
      }
    }
  } else {
    hopper::raise_registers<hopper::kMultiplyRegisters>();
    const int row = 64 * group + 16 * warp;  // of the warp, in the tile
    const uint32_t lane_row = (row + lane % 16) * hopper::kRowBytes;
    const uint32_t lane_bits = (row + lane / 4) * kMaskBytes;
    const int chunk = lane / 16;
    for (int index = first; index < order.count(); index += stride) {
      int tile_n, tile_m;
      order.at(index, rank, tile_n, tile_m);
      const int n0 = tile_n * hopper::kRowsA + row, m0 = tile_m * kTokens;

      float bias[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = min(n0 + 8 * half + lane / 4, out.N - 1);
        bias[half] = out.bias == nullptr ? -0.0f : out.bias[n];  // adding -0 changes nothing
      }

      // Two sets of fragments take turns: while the tensor cores read one, the other is loaded and masked.
      float sums[kMasks][kTokens / 2];
      Fragments<kMasks> front, back;
      ring.wait_full(position);
      front.load(ring.a(position.stage) + lane_row, chunk, ring.extra(position.stage) + lane_bits);
      int previous = 0;
      for (int step = 0; step < steps; ++step) {
        const int stage = position.stage;
        const uint64_t tokens = hopper::tile_descriptor(ring.b(stage));
        begin_products(sums, front, tokens, step > 0);
        hopper::wgmma_wait<1>();  // for those of back, which end what the stage before has to give
        back.hold();
        if (step > 0) ring.leave(previous, order.blocks);
        back.load(ring.a(stage) + lane_row, chunk + 4, ring.extra(stage) + lane_bits + kMaskBytes / 2);
        begin_products(sums, back, tokens + 2 * hopper::kDescriptorStep, true);
        hopper::wgmma_wait<1>();  // for those of front
        front.hold();
        previous = stage;
        R::advance(position);
        if (step + 1 < steps) {
          ring.wait_full(position);
          front.load(ring.a(position.stage) + lane_row, chunk, ring.extra(position.stage) + lane_bits);
        }
      }
      hopper::wgmma_wait<0>();
#pragma unroll
      for (int v = 0; v < kMasks; ++v) hopper::hold(sums[v]);
      ring.leave(previous, order.blocks);

#pragma unroll
      for (int v = 0; v < kMasks; ++v)
        store(out, out.y + v * static_cast<int64_t>(out.M) * out.N, m0, n0, sums[v], bias);
    }
  }
  hopper::cluster_sync();  // a block stays while the other may write to its shared memory
#endif
}

int64_t weight_tiles(const MaskedLinear& args) { return (args.N + hopper::kRowsA - 1) / hopper::kRowsA; }

// kMasks masks, from the first-th on.
template <int kMasks, int kTokens>
void launch(const MaskedLinear& args, int64_t first, cudaStream_t stream) {
  hopper::TileOrder order;
  order.blocks = cluster_blocks(weight_tiles(args));
  order.rows_a = static_cast<int>((weight_tiles(args) + order.blocks - 1) / order.blocks);
  order.rows_b = static_cast<int>((args.M + kTokens - 1) / kTokens);
  const CUtensorMap map_weight = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.weight, args.N, args.K,
                                            2 * args.weight_stride, 2, hopper::kRowsA);
  const CUtensorMap map_x = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.x, args.M, args.K,
                                       2 * args.x_stride, 2, kTokens / order.blocks);
  Masks out;
  out.mask = args.mask + first * args.mask_variant_stride;
  out.row_stride = args.mask_row_stride;
  out.variant_stride = args.mask_variant_stride;
  out.row_bytes = static_cast<int>((args.K + 7) / 8);
  out.bias = args.bias;
  out.y = static_cast<__nv_bfloat16*>(args.y) + first * args.M * args.N;
  out.M = static_cast<int>(args.M);
  out.N = static_cast<int>(args.N);
  out.wide = reinterpret_cast<uintptr_t>(args.y) % 16 == 0 && args.N % 8 == 0;
  const int steps = static_cast<int>((args.K + kEntries - 1) / kEntries);
  launch_clusters(masked_hopper_kernel<kMasks, kTokens>, "masked_linear", order.blocks,
                  int64_t{order.rows_a} * order.rows_b, hopper::kThreads,
                  MaskedRing<kMasks, kTokens>::kSharedBytes, MaskedRing<kMasks, kTokens>::kSharedBytes,
                  /*early=*/false, stream, map_weight, map_x, order, steps, out);
}

void launch_one(const MaskedLinear& args, int64_t first, cudaStream_t stream) {
  // Of the two widths the one whose busiest block has the fewest tokens; the narrow one loads more for each.
  const int blocks = cluster_blocks(weight_tiles(args));
  const int64_t wide = 256 * tiles_of_a_block(weight_tiles(args), (args.M + 255) / 256, blocks);
  const int64_t narrow = 128 * tiles_of_a_block(weight_tiles(args), (args.M + 127) / 128, blocks);
  if (wide * 10 <= narrow * 11)
    launch<1, 256>(args, first, stream);
  else
    launch<1, 128>(args, first, stream);
}

}  // namespace

bool masked_hopper_possible(const MaskedLinear& args) {
  constexpr int64_t kMostTiles = int64_t{1} << 30;
  // Bits are copied by 8 bytes.
  const bool bits_aligned = reinterpret_cast<uintptr_t>(args.mask) % kMaskBytes == 0 &&
                            args.mask_row_stride % kMaskBytes == 0 &&
                            args.mask_variant_stride % kMaskBytes == 0;
  return args.type == FloatType::kBfloat16 && args.V >= 1 && bits_aligned && compute_capability() == 90 &&
         tensor_map_possible(args.x, args.M, args.K, 2 * args.x_stride, 2) &&
         tensor_map_possible(args.weight, args.N, args.K, 2 * args.weight_stride, 2) &&
         (args.N / hopper::kRowsA + 2) * (args.M / 64 + 1) < kMostTiles;
}

void masked_hopper(const MaskedLinear& args, CUstream_st* stream) {
  // Several masks share the loads of the weight, and as many sums as there are registers: the more masks, the
  // fewer tokens in a tile. Where there are more tokens than that, the tensor cores are what one waits for.
  for (int64_t v = 0; v < args.V;) {
    if (args.V - v >= 4 && args.M <= 64) {
      launch<4, 64>(args, v, stream);
      v += 4;
    } else if (args.V - v >= 2 && args.M <= 128) {
      launch<2, 128>(args, v, stream);
      v += 2;
    } else {
      launch_one(args, v, stream);
      v += 1;
    }
  }
}

}  // namespace dtm_fast
