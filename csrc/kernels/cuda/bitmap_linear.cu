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
constexpr int kStageBytes = kTileValues * 2;
// Of 32 columns: 16 bytes of a token for each of four lanes, two mma.
constexpr int kParts = kTileColumns / 32;
constexpr int kAlign = 8;  // a tile's values begin at a multiple: 16 bytes
// A warp takes so many tiles of a strip of 16 rows at once: it keeps their columns of the tokens in
// registers, for all strips of its block.
constexpr int kTiles = 2;

// kTokenTiles: tiles of 8 tokens. kStages: tiles of a warp in shared memory, one in use, the others on their
// way.
template <int kTokenTiles_, int kWarps_, int kStages_>
struct Shape {
  static constexpr int kTokenTiles = kTokenTiles_, kWarps = kWarps_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarps;
  // Warps wait for each other only when the sums of so many strips times tokens are there: one for a thread.
  static constexpr int kHeld = kThreads / kRowTile;
  static constexpr int kWarpSums = kThreads;
  static constexpr int kStagesOffset = 4 * kWarps * kWarpSums;
  static constexpr int kSharedBytes = kStagesOffset + kWarps * kStages * kStageBytes;
  static_assert(kHeld >= kMostBitmapTokens, "one strip of all tokens");
};

// Where the sum of a row is, of that of a warp's strips times tokens: lanes that put their fragments of mma
// there meet 32 banks, and so do those that read rows.
__device__ __forceinline__ int sum_place(int held, int row) {
  return (held * kRowTile + row) ^ (held / 2 % 4 * 8);
}

// Shared memory by its 32-bit addresses: the loop has no instructions to spare.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
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
// volatile, to stay far ahead of its use.
__device__ __forceinline__ uint2 load_bits(const uint32_t* from) {
  uint2 words;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(words.x), "=r"(words.y)
               : "l"(from));
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
// value >> 16 by the multipliers, which have less to do than what shifts, permutes and masks.
__device__ __forceinline__ uint32_t high_half(uint32_t value) {
  uint32_t half;
  asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(half) : "r"(value), "r"(0x0100), "r"(0));
  return half;
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
  second = permute(near, far, high_half(selectors));
}

// How many words the runs of four mma have, a byte each: in the lanes before this one, in those and this one,
// in all lanes (at most 128). They are found in steps, between those of other work, which hide the time that
// the shuffles take.
struct Places {
  static constexpr int kSteps = 7;
  uint32_t before, upto, all;

  // Bit 4 element + mma of `bits`.
  __device__ __forceinline__ void step(int i, uint32_t bits) {
    if (i == 0) {
      before = __popc(bits & 0x88888888u);
#pragma unroll
      for (int mma = 2; mma >= 0; --mma)
        before = multiply_add(before, 256, __popc(bits & (0x11111111u << mma)));
      upto = before = ((before + 0x01010101u) >> 1) & 0x07070707u;
    } else if (i < 6) {
      add_from_below(upto, 1 << (i - 1));
    } else if (i == 6) {
      before = upto - before;
      all = __shfl_sync(0xffffffffu, upto, 31);
    }
  }
};
struct TilePlaces {
  Places words[2];

  __device__ __forceinline__ void step(int i, uint2 bits) {
    words[0].step(i, bits.x);
    words[1].step(i, bits.y);
  }
};

// sum += the tile in a stage, whose bits of this lane are `pair`, * tokens. Meanwhile finds the places of the
// next tile.
template <int kTokenTiles>
__device__ __forceinline__ void multiply(float (&sum)[kTokenTiles][4], uint32_t stage, uint2 pair,
                                         const TilePlaces& places, const uint4 (&x)[kTokenTiles][kParts],
                                         uint2 next_pair, TilePlaces& next) {
  constexpr int kMma = 2 * kParts;
  static_assert(kMma >= Places::kSteps, "one after each product");
  const uint32_t dropped[2] = {~pair.x, ~pair.y};
  uint32_t base = stage;  // where the runs of an mma begin
#pragma unroll
  for (int j = 0; j < kMma; ++j) {
    const Places& four = places.words[j / 4];
    const uint32_t bytes = 4u << (j % 4 * 8);  // of a word, where dp4a finds the count
    const uint32_t begin = __dp4a(four.before, bytes, base), end = __dp4a(four.upto, bytes, base);
    base = __dp4a(four.all, bytes, base);
    const uint32_t kept[4] = {load_word<0>(begin), load_word<4>(begin), load_word<-4>(end),
                              load_word<-8>(end)};
    next.step(j, next_pair);
    uint32_t w[4];
    expand<false>(w[0], w[1], kept[0], kept[1], (dropped[j / 4] >> (j % 4)) & 0x1111u);
    expand<true>(w[2], w[3], kept[2], kept[3], (dropped[j / 4] >> (16 + j % 4)) & 0x1111u);
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
  int last_strip, batch_size, batch, batch_end, chunk, tiles, tiles_left, strips_left;

  __device__ Walk(const Division<kWarps>& division_, int first, int last, int batch_size_)
      : division(division_),
        index(static_cast<unsigned>(first) * division_.tiles + division_.begin(0)),
        last_strip(last),
        batch_size(batch_size_) {
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
    batch_end = min(first + batch_size, last_strip);
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
  // If the warps of a block together do not cover K, they take a chunk of it after the other, for so many
  // strips that a thread keeps its output.
  const int group = S::kHeld / M, batch_size = division.chunks == 1 ? last - first : group;

  // Copies run ahead of the products over the ends of strips. Where the values of the next tile to copy begin
  // and end is asked for one tile ahead, not to be waited for.
  Walk<kWarps> walk(division, first, last, batch_size);
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
    uint2 pair = {0, 0};
    if (walk.more()) {
      const uint16_t* source = values + from;
      pin(source);
      const uint32_t target = stage + lane * 2 * kAlign;
      const int pieces = (static_cast<int>(to - from) >> 3) - lane;  // of kAlign values
      pair = load_bits(bits + uint64_t{walk.index} * kTileBits);
#pragma unroll
      for (int i = 0; i < kTileValues / kAlign / 32; ++i) {
        if (i == 4 && pieces <= 4 * 32) break;
        if (pieces > i * 32) copy16(target + i * 32 * 2 * kAlign, source + i * 32 * kAlign);
      }
      walk.next();
      ask();
    }
    commit_copies();
    return pair;
  };
  const uint32_t stages = shared_address(memory) + S::kStagesOffset + warp * kStages * kStageBytes;
  uint2 pairs[kStages];  // the bits of the tiles in the stages, the one in use first
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) pairs[s] = copy(stages + s * kStageBytes);
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

  TilePlaces places;
#pragma unroll
  for (int i = 0; i < Places::kSteps; ++i) places.step(i, pairs[0]);
  float* const sums = reinterpret_cast<float*>(memory);
  // The output that this thread adds up, if there is one for it.
  const int row = threadIdx.x % kRowTile, output = threadIdx.x / kRowTile, m = output % M,
            member = output / M;
  const float* const each = sums + sum_place(output, row);
  bool begun = false;
#pragma unroll 1
  for (int batch = first; batch < last; batch += batch_size) {
    const int batch_end = min(batch + batch_size, last);
    float total = 0.0f;
#pragma unroll 1
    for (int chunk = 0; chunk < division.chunks; ++chunk) {
      const int begin = division.begin(chunk), end = division.end(chunk);
#pragma unroll
      for (int k = 0; k < kTiles; ++k) load_tokens(begin + k, end, x[k]);
      int held = 0;  // strips whose sums are in shared memory
#pragma unroll 1
      for (int strip = batch; strip < batch_end; ++strip) {
        float sum[kTokenTiles][4] = {};
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          if (begin + k >= end) break;
          wait_for_copies<kStages - 2>();
          __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled next
          pairs[kStages - 1] = copy(filled);
          filled = stage;
          TilePlaces next;
          multiply<kTokenTiles>(sum, stage, pairs[0], places, x[k], pairs[1], next);
          places = next;
#pragma unroll
          for (int s = 0; s + 1 < kStages; ++s) pairs[s] = pairs[s + 1];
          stage = stage + kStageBytes == stages + kStages * kStageBytes ? stages : stage + kStageBytes;
        }
        if (held == 0 && begun) __syncthreads();  // the sums before are read
        begun = true;
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int token = kTokenTile * i + 2 * t + r % 2;
            if (token < M) sums[warp * S::kWarpSums + sum_place(held * M + token, g + r / 2 * 8)] = sum[i][r];
          }
        }
        if (++held < group && strip + 1 < batch_end) continue;
        __syncthreads();
        const int64_t n = int64_t{strip + 1 - held + member} * kRowTile + row;
        const bool has_output = member < held;
        held = 0;
        if (!has_output) continue;
        if (chunk == 0) total = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total = __fadd_rn(total, each[w * S::kWarpSums]);
        if (chunk + 1 < division.chunks || n >= args.N) continue;
        const float result = args.bias != nullptr ? __fadd_rn(total, args.bias[n]) : total;
        store(static_cast<uint16_t*>(args.y) + m * args.N + n, result);
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
  if (reinterpret_cast<uintptr_t>(args.bits) % 8 != 0)
    throw std::runtime_error("bitmap_linear: bits must begin at a multiple of 8 bytes");
  if (args.M == 0 || args.N == 0) return;
  (args.M <= kTokenTile ? choose_shape<1> : choose_shape<2>)(args, stream);
}

}  // namespace dtm_fast
