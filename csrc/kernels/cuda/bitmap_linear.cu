#include <algorithm>
#include <stdexcept>

#include "bitmap_linear.h"
#include "few_tokens.h"

namespace dtm_fast {
namespace {

using namespace few_tokens;

// The format (dtm_fast/ops/bitmap_weight.py) cuts the weight into tiles of 16 rows and 128 columns, eight
// mma, of each of which a lane has eight elements. Their values are a run of whole words: those of the first
// four elements from the front, those of the last four from the back. So a lane has each four in two words
// that it reads without shifting, and two prmt put them to their places. Runs follow in the order mma, lane:
// the lanes read neighbouring words of shared memory, with few bank conflicts up to a density of a half;
// where a run begins is a prefix sum over the lanes, one for four mma because four counts fit into a word.
// (Bitmaps in the order of the fragments: SpInfer, Fan et al. 2025; there a lane has two elements at a time.)
constexpr int kTileColumns = 128;
constexpr int kTileValues = kRowTile * kTileColumns;
constexpr int kTileBits = kTileValues / 32;  // words
// Of 32 columns: 16 bytes of a token for each of four lanes, two mma.
constexpr int kParts = kTileColumns / 32;
constexpr int kAlign = 8;  // a tile's values begin at a multiple: 16 bytes
// A stage: the values of a tile, then its bits.
constexpr int kBitsOffset = kTileValues * 2;
constexpr int kStageBytes = kBitsOffset + kTileBits * 4;
// A warp takes so many tiles of a strip of 16 rows at once: it keeps their columns of the tokens in
// registers, for all strips of its block.
constexpr int kTiles = 2;
// If the warps of a block together do not cover K, they take a chunk of it after the other, and so many
// strips at once, whose sums wait in shared memory.
constexpr int kBatch = 2;

// kTokenTiles: tiles of 8 tokens. kStages: tiles of a warp in shared memory, one in use, the others on their
// way.
template <int kTokenTiles_, int kWarps_, int kStages_>
struct Shape {
  static constexpr int kTokenTiles = kTokenTiles_, kWarps = kWarps_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarps;
  // Strips whose sums are added up together: each time, the warps wait for each other.
  static constexpr int kGroup = 2 / kTokenTiles;
  static constexpr int kTokens = kTokenTile * kTokenTiles;
  static constexpr int kOutputs = kGroup * kTokens * kRowTile;
  static constexpr int kWarpSums = kGroup * kTokens * kSumStride<kRowTile>;
  static constexpr int kStagesOffset = 4 * (kWarps * kWarpSums + kBatch / kGroup * kOutputs);
  static constexpr int kSharedBytes = kStagesOffset + kWarps * kStages * kStageBytes;
  static_assert(kOutputs <= kThreads, "a thread adds up one output");
};

// Shared memory by its 32-bit addresses: the loop has no instructions to spare.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy8(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
template <int kOffset>
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(address), "n"(kOffset));
  return word;
}
__device__ __forceinline__ uint2 load_words(uint32_t address) {
  uint2 words;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(address));
  return words;
}
// Not __byte_perm, which clears the highest bit of every selector.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}
// One instruction, where the compiler makes two of a sum whose bits do not meet.
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
// So the compiler computes it once and does not repeat its terms in every address.
__device__ __forceinline__ void pin(const uint16_t*& pointer) { asm volatile("" : "+l"(pointer)); }
// Adds what the lane `distance` before this one has, if there is one.
__device__ __forceinline__ void add_from_below(uint32_t& value, int distance) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      ".reg .b32 other;\n"
      "shfl.sync.up.b32 other|p, %0, %1, 0, 0xffffffff;\n"
      "@p add.u32 %0, %0, other;\n"
      "}"
      : "+r"(value)
      : "r"(distance));
}
// End of the instructions.

// Four elements of which those are kept whose bit of 0, 4, 8, 12 of `dropped` is 0; the values of the kept
// are in `near`, then in `far`, in the order in which kBack says that a run is filled. The selector of prmt
// for an element is a function of its bit and of how many are kept before it, (2 before + bit) < 8, which one
// product gives for all four; and prmt is a table with eight entries of one byte. What is dropped is taken
// from the last place, which is free, hence 0, unless all four are kept.
template <bool kBack>
__device__ __forceinline__ void expand(uint32_t& first, uint32_t& second, uint32_t near, uint32_t far,
                                       uint32_t dropped) {
  constexpr uint32_t kLow = kBack ? 0x10543254u : 0x32761076u, kHigh = kBack ? 0x54547654u : 0x76765476u;
  const uint32_t selectors = permute(kLow, kHigh, 0x1111u * 0x2221u - dropped * 0x2221u);
  if (dropped != 0) far &= kBack ? 0xffff0000u : 0x0000ffffu;
  first = permute(near, 0, selectors);  // of these two, no value is in `far`
  second = permute(near, far, selectors >> 16);
}

// How many words the runs of four mma have, a byte each: in the lanes before this one, in those and this one,
// in all lanes (at most 128).
struct Places {
  uint32_t before, upto, all;
};

// Bit 4 element + mma of `bits`.
__device__ __forceinline__ Places find_places(uint32_t bits) {
  uint32_t count = __popc(bits & 0x88888888u);
#pragma unroll
  for (int i = 2; i >= 0; --i) count = multiply_add(count, 256, __popc(bits & (0x11111111u << i)));
  count = ((count + 0x01010101u) >> 1) & 0x07070707u;
  uint32_t upto = count;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) add_from_below(upto, distance);
  return {upto - count, upto, __shfl_sync(0xffffffffu, upto, 31)};
}

// sum += the tile in a stage, whose bits of this lane are `pair`, * tokens.
template <int kTokenTiles>
__device__ __forceinline__ void multiply(float (&sum)[kTokenTiles][4], uint32_t stage, uint2 pair,
                                         const uint4 (&x)[kTokenTiles][kParts]) {
  const uint32_t bits[2] = {pair.x, pair.y};
  const Places places[2] = {find_places(bits[0]), find_places(bits[1])};
  uint32_t base = stage;  // where the runs of an mma begin
#pragma unroll
  for (int j = 0; j < 2 * kParts; ++j) {
    const Places& four = places[j / 4];
    const uint32_t bytes = 4u << (j % 4 * 8);  // of a word, where dp4a finds the count
    const uint32_t begin = __dp4a(four.before, bytes, base), end = __dp4a(four.upto, bytes, base);
    base = __dp4a(four.all, bytes, base);
    const uint32_t dropped = ~bits[j / 4];
    uint32_t w[4];
    expand<false>(w[0], w[1], load_word<0>(begin), load_word<4>(begin), (dropped >> (j % 4)) & 0x1111u);
    expand<true>(w[2], w[3], load_word<-4>(end), load_word<-8>(end), (dropped >> (16 + j % 4)) & 0x1111u);
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const uint4& pairs = x[i][j / 2];
      mma_bfloat16(sum[i], w[0], w[1], w[2], w[3], j % 2 == 0 ? pairs.x : pairs.z,
                   j % 2 == 0 ? pairs.y : pairs.w);
    }
  }
}

// `count` things divided evenly, the first parts longer by one if need be.
struct Even {
  int each, longer;

  __device__ Even(int count, int parts) : each(count / parts), longer(count % parts) {}
  __device__ int begin(int part) const { return part * each + min(part, longer); }
};

// Which tiles of a strip a warp takes in a chunk of K: K alone decides.
template <int kWarps>
struct Division {
  int tiles, chunks, warp;
  Even even;

  __device__ Division(int64_t K, int warp_)
      : tiles(static_cast<int>((K + kTileColumns - 1) / kTileColumns)),
        chunks(max((tiles + kTiles * kWarps - 1) / (kTiles * kWarps), 1)),
        warp(warp_),
        even(tiles, chunks) {}
  __device__ int begin(int chunk, int w) const {
    const int from = even.begin(chunk);
    return from + (even.begin(chunk + 1) - from) * w / kWarps;
  }
  __device__ int begin(int chunk) const { return begin(chunk, warp); }
  __device__ int end(int chunk) const { return begin(chunk, warp + 1); }
};

// The tiles that a warp reads, in their order: batches of strips, chunks of K, strips, tiles.
template <int kWarps>
struct Walk {
  const Division<kWarps>& division;
  unsigned index;  // of the next tile in the weight
  int last_strip, batch, batch_end, chunk, tiles, tiles_left, strips_left;

  __device__ Walk(const Division<kWarps>& division_, int first, int last)
      : division(division_),
        index(static_cast<unsigned>(first) * division_.tiles + division_.begin(0)),
        last_strip(last) {
    begin_batch(first);
    begin_chunk(0);
    if (tiles == 0) strips_left = 0;  // then so in every chunk, as there is only one
  }
  __device__ bool more() const { return strips_left > 0; }
  __device__ void next() {
    ++index;
    if (--tiles_left > 0) return;
    tiles_left = tiles;
    index += division.tiles - tiles;
    if (--strips_left > 0 || division.chunks == 1) return;
    // Back to the first strip of the batch or on to the next batch.
    index -= division.begin(chunk);
    if (chunk + 1 < division.chunks) {
      begin_chunk(chunk + 1);
      index -= strips_left * division.tiles;
    } else if (batch_end < last_strip) {
      begin_batch(batch_end);
      begin_chunk(0);
    }
    index += division.begin(chunk);
  }
  __device__ void begin_batch(int first) {
    batch = first;
    batch_end = division.chunks == 1 ? last_strip : min(first + kBatch, last_strip);
  }
  __device__ void begin_chunk(int next_chunk) {
    chunk = next_chunk;
    tiles = tiles_left = division.end(chunk) - division.begin(chunk);
    strips_left = batch_end - batch;
  }
};

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) bitmap_linear_kernel(BitmapLinear args, bool aligned) {
  constexpr int kTokenTiles = S::kTokenTiles, kWarps = S::kWarps, kStages = S::kStages;
  extern __shared__ __align__(16) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int M = static_cast<int>(args.M);
  const Division<kWarps> division(args.K, warp);
  const Even strips(static_cast<int>((args.N + kRowTile - 1) / kRowTile), static_cast<int>(gridDim.x));
  const int block = static_cast<int>(blockIdx.x);
  const int first = strips.begin(block), last = strips.begin(block + 1);

  // Copies run ahead of the products over the ends of strips. Where the values of the next tile to copy begin
  // and end is asked for one tile ahead, not to be waited for.
  Walk<kWarps> walk(division, first, last);
  int64_t from = 0, to = 0;
  const auto ask = [&] {
    if (!walk.more()) return;
    from = args.begins[uint64_t{walk.index}];
    to = args.begins[uint64_t{walk.index} + 1];
  };
  ask();
  const uint32_t* const bits = args.bits + 2 * lane;
  const uint16_t* const values = static_cast<const uint16_t*>(args.values) + lane * kAlign;
  const auto copy = [&](uint32_t stage) {
    if (walk.more()) {
      const uint16_t* source = values + from;
      pin(source);
      const uint32_t target = stage + lane * 2 * kAlign;
      const int pieces = (static_cast<int>(to - from) >> 3) - lane;  // of kAlign values
      copy8(stage + kBitsOffset + lane * 8, bits + uint64_t{walk.index} * kTileBits);
#pragma unroll
      for (int i = 0; i < kTileValues / kAlign / 32; ++i) {
        if (i == 4 && pieces <= 4 * 32) break;
        if (pieces > i * 32) copy16(target + i * 32 * 2 * kAlign, source + i * 32 * kAlign);
      }
      walk.next();
      ask();
    }
    commit_copies();
  };
  const uint32_t stages = shared_address(memory) + S::kStagesOffset + warp * kStages * kStageBytes;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy(stages + s * kStageBytes);
  uint32_t stage = stages, filled = stages + (kStages - 1) * kStageBytes;

  uint4 x[kTiles][kTokenTiles][kParts];
  const int whole = aligned ? static_cast<int>(args.K / kTileColumns) : 0;  // tiles read 16 bytes at a time
  const auto load_tokens = [&](int tile, int tile_end, uint4(&to_fill)[kTokenTiles][kParts]) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const int64_t column = int64_t{tile} * kTileColumns + 8 * t;
      const uint16_t* token =
          static_cast<const uint16_t*>(args.x) + int64_t{g + 8 * i} * args.x_stride + column;
#pragma unroll
      for (int h = 0; h < kParts; ++h) {
        to_fill[i][h] = make_uint4(0, 0, 0, 0);
        if (g + 8 * i >= M || tile >= tile_end) continue;
        to_fill[i][h] = tile < whole ? __ldg(reinterpret_cast<const uint4*>(token + 32 * h))
                                     : load_some(token + 32 * h, args.K - column - 32 * h);
      }
    }
  };

  float* const sums = reinterpret_cast<float*>(memory);
  float* const waiting = sums + kWarps * S::kWarpSums + threadIdx.x;
  // The output that this thread adds up, if there is one for it.
  const int row = threadIdx.x % kRowTile, m = threadIdx.x / kRowTile % S::kTokens,
            member = threadIdx.x / kRowTile / S::kTokens;
  const float* const each = sums + threadIdx.x / kRowTile * kSumStride<kRowTile> + row;
  const int batch_size = division.chunks == 1 ? last - first : kBatch;
#pragma unroll 1
  for (int batch = first; batch < last; batch += batch_size) {
    const int batch_end = min(batch + batch_size, last);
#pragma unroll 1
    for (int chunk = 0; chunk < division.chunks; ++chunk) {
      const int begin = division.begin(chunk), end = division.end(chunk);
#pragma unroll
      for (int k = 0; k < kTiles; ++k) load_tokens(begin + k, end, x[k]);
#pragma unroll 1
      for (int strip = batch; strip < batch_end; ++strip) {
        float sum[kTokenTiles][4] = {};
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          if (begin + k >= end) break;
          wait_for_copies<kStages - 2>();
          __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled next
          const uint2 pair = load_words(stage + kBitsOffset + lane * 8);  // on its way during the copies
          copy(filled);
          filled = stage;
          multiply<kTokenTiles>(sum, stage, pair, x[k]);
          stage = stage + kStageBytes == stages + kStages * kStageBytes ? stages : stage + kStageBytes;
        }
        const unsigned index = strip - batch;
        if (index % S::kGroup == 0) __syncthreads();  // the sums before are read
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i)
          put_sums<kRowTile>(sums + warp * S::kWarpSums, sum[i], 0,
                             kTokenTile * i + index % S::kGroup * S::kTokens, lane);
        if (index % S::kGroup != S::kGroup - 1 && strip + 1 < batch_end) continue;
        __syncthreads();
        if (m >= M || member > static_cast<int>(index % S::kGroup)) continue;
        float* const before = waiting + index / S::kGroup * S::kOutputs;
        float total = chunk == 0 ? 0.0f : *before;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total = __fadd_rn(total, each[w * S::kWarpSums]);
        const int64_t n = int64_t{strip - static_cast<int>(index % S::kGroup) + member} * kRowTile + row;
        if (chunk + 1 < division.chunks) {
          *before = total;
        } else if (n < args.N) {
          if (args.bias != nullptr) total = __fadd_rn(total, args.bias[n]);
          store(static_cast<uint16_t*>(args.y) + m * args.N + n, total);
        }
      }
    }
  }
  wait_for_copies<0>();
}

template <typename S>
void launch(const BitmapLinear& args, CUstream_st* stream) {
  const auto kernel = bitmap_linear_kernel<S>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes),
             "bitmap_linear");
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.x_stride % 8 == 0;
  const int64_t strips = (args.N + kRowTile - 1) / kRowTile;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(strips, multiprocessors()));
  kernel<<<blocks, S::kThreads, S::kSharedBytes, stream>>>(args, aligned);
  check_cuda(cudaGetLastError(), "bitmap_linear");
}

template <int kTokenTiles>
void choose_shape(const BitmapLinear& args, CUstream_st* stream) {
  using Large = Shape<kTokenTiles, 16, 3>;  // a block may have 227 KiB on 9.0, 163 on 8.0, 99 on others
  using Middle = Shape<kTokenTiles, 16, 2>;
  using Small = Shape<kTokenTiles, 8, 2>;
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (most >= Large::kSharedBytes) return launch<Large>(args, stream);
  if (most >= Middle::kSharedBytes) return launch<Middle>(args, stream);
  launch<Small>(args, stream);
}

}  // namespace

void bitmap_linear_cuda(const BitmapLinear& args, CUstream_st* stream) {
  if (args.type != FloatType::kBfloat16 || args.M > kMostBitmapTokens)
    throw std::runtime_error("bitmap_linear: takes at most 16 rows of bfloat16");
  if (reinterpret_cast<uintptr_t>(args.values) % 16 != 0)
    throw std::runtime_error("bitmap_linear: values must begin at a multiple of 16 bytes");
  if (args.M == 0 || args.N == 0) return;
  (args.M <= kTokenTile ? choose_shape<1> : choose_shape<2>)(args, stream);
}

}  // namespace dtm_fast
