#include "sparse_pack.h"

#include <emmintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel_for.h"
#include "store_float.h"

namespace dtm_fast {
namespace {

// Bits first .. first + count - 1 of a row of the mask, count <= 64. Reads no byte but those that hold them.
uint64_t bits_of(const uint8_t* row, int64_t first, int64_t count) {
  if (count <= 0) return 0;
  const int64_t shift = first % 8, bytes = (shift + count + 7) / 8;
  uint64_t low = 0;
  if (bytes >= 8) {
    std::memcpy(&low, row + first / 8, 8);  // one load: a length that is not known is a call
  } else {
    std::memcpy(&low, row + first / 8, static_cast<size_t>(bytes));
  }
  uint64_t bits = low >> shift;
  if (bytes > 8) bits |= static_cast<uint64_t>(row[first / 8 + 8]) << (64 - shift);
  return count == 64 ? bits : bits & ((uint64_t{1} << count) - 1);
}

int64_t sum_of_bytes(__m128i bytes) {
  const __m128i halves = _mm_sad_epu8(bytes, _mm_setzero_si128());
  return _mm_cvtsi128_si64(_mm_add_epi64(halves, _mm_unpackhi_epi64(halves, halves)));
}

// The kept columns of a row in a block: columns 0 .. 63 and 64 .. 126.
struct Kept {
  uint64_t half[2];

  // Sums of two, four, eight bits side by side, then of bytes: the baseline has no instruction for it.
  int64_t count() const {
    constexpr uint64_t kTwos = 0x5555555555555555, kFours = 0x3333333333333333, kBytes = 0x0f0f0f0f0f0f0f0f;
    uint64_t sum = 0;
    for (uint64_t bits : half) {
      bits -= bits >> 1 & kTwos;
      bits = (bits & kFours) + (bits >> 2 & kFours);
      sum += (bits + (bits >> 4)) & kBytes;
    }
    return static_cast<int64_t>(sum * 0x0101010101010101 >> 56);
  }
};

Kept kept_in(const SparseOrder& args, int64_t n, int64_t block) {
  const uint8_t* row = args.mask + n * args.mask_stride;
  const int64_t k0 = block * kSparseBlock, depth = std::min(kSparseBlock, args.K - k0);
  return {{bits_of(row, k0, std::min<int64_t>(depth, 64)), bits_of(row, k0 + 64, depth - 64)}};
}

// Sorts the rows of a panel by their counts, descending and stable: a counting sort.
void order_block(const SparseOrder& args, const SparseLayout& layout, int64_t panel, int64_t block) {
  const int64_t n0 = panel * layout.panel_rows, real = std::min(layout.panel_rows, args.N - n0);
  const int64_t index = panel * layout.blocks + block;
  uint16_t* rows = args.rows + index * layout.panel_rows;
  uint8_t* steps = args.steps + index * layout.groups;
  std::fill(steps, steps + layout.groups, uint8_t{0});  // also of groups that lie wholly beyond N
  uint8_t counts[kSparseMostPanelRows];
  int64_t place[kSparseBlock + 2] = {};  // place[c]: where the next row with c entries goes
  for (int64_t r = 0; r < real; ++r) {
    const Kept kept = kept_in(args, n0 + r, block);
    counts[r] = static_cast<uint8_t>(kept.count());
    ++place[counts[r]];
  }
  int64_t next = 0;
  for (int64_t c = kSparseBlock; c >= 0; --c) {
    const int64_t rows_of_count = place[c];
    place[c] = next;
    next += rows_of_count;
  }
  for (int64_t r = 0; r < real; ++r) {
    const int64_t at = place[counts[r]]++;
    rows[at] = static_cast<uint16_t>(r);
    if (at % kSparseLanes == 0) steps[at / kSparseLanes] = counts[r];  // the first of a group has most
  }
  std::fill(rows + real, rows + layout.panel_rows, static_cast<uint16_t>(layout.panel_rows));
}

template <FloatType type>
float weight_at(const void* row, int64_t k) {
  if constexpr (type == FloatType::kFloat32) return static_cast<const float*>(row)[k];
  return float_from_bfloat16(static_cast<const uint16_t*>(row)[k]);
}

// One row of a group: every kSparseLanes-th value and every kSparseLanes-th word.
template <FloatType type>
void pack_row(const SparsePack& args, int64_t n, int64_t block, int64_t steps, float* values,
              uint8_t* columns) {
  const int64_t words_end = (steps + kSparseWord - 1) / kSparseWord * kSparseWord;
  const auto put_column = [&](int64_t s, int64_t column) {
    columns[s / kSparseWord * kSparseLanes * kSparseWord + s % kSparseWord] = static_cast<uint8_t>(column);
  };
  int64_t s = 0;
  if (n >= 0) {
    const void* row = static_cast<const char*>(args.weight) + n * args.weight_stride * size_of(type);
    const Kept kept = kept_in(args.order, n, block);
    // One loop for both halves: its trip count is nearly that of the row before, hence predicted.
    uint64_t bits = kept.half[0];
    int64_t first = 0;
    for (const int64_t count = kept.count(); s < count; ++s, bits &= bits - 1) {
      first = bits == 0 ? 64 : first;
      bits = bits == 0 ? kept.half[1] : bits;
      const int64_t column = first + __builtin_ctzll(bits);
      values[s * kSparseLanes] = weight_at<type>(row, block * kSparseBlock + column);
      put_column(s, column);
    }
  }
  for (; s < words_end; ++s) {
    if (s < steps) values[s * kSparseLanes] = 0.0f;
    put_column(s, kSparseBlock);
  }
}

}  // namespace

void sparse_order(const SparseOrder& args, int num_threads) {
  const SparseLayout layout = sparse_layout(args.N, args.K);
  parallel_for(layout.panels * layout.blocks, num_threads, [&](int64_t task, int) {
    order_block(args, layout, task / layout.blocks, task % layout.blocks);
  });
}

void sparse_starts(const SparseLayout& layout, const uint8_t* steps, SparseStart* starts) {
  constexpr int64_t kAhead = 8192;  // bytes: they come from memory, and nothing else can begin before
  for (int64_t i = 0; i < kAhead; i += 64) __builtin_prefetch(steps + i);
  starts[0] = {0, 0};
  for (int64_t i = 0; i < layout.panels * layout.blocks; ++i, steps += layout.groups) {
    __builtin_prefetch(steps + kAhead);
    int64_t step_count = 0, word_count = 0, g = 0;
    for (; g + 16 <= layout.groups; g += 16) {
      const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(steps + g));
      step_count += sum_of_bytes(sixteen);
      static_assert(kSparseWord == 4, "halved twice: the average with 0 is half of a number, rounded up");
      word_count +=
          sum_of_bytes(_mm_avg_epu8(_mm_avg_epu8(sixteen, _mm_setzero_si128()), _mm_setzero_si128()));
    }
    for (; g < layout.groups; ++g) {
      step_count += steps[g];
      word_count += (steps[g] + kSparseWord - 1) / kSparseWord;
    }
    starts[i + 1] = {starts[i].step + step_count, starts[i].word + word_count};
  }
}

void sparse_pack_block(const SparsePack& args, int64_t index, const SparseStart& start) {
  const SparseLayout layout = sparse_layout(args.order.N, args.order.K);
  const int64_t panel = index / layout.blocks, block = index % layout.blocks;
  const auto pack =
      args.type == FloatType::kFloat32 ? pack_row<FloatType::kFloat32> : pack_row<FloatType::kBfloat16>;
  float* values = args.values + start.step * kSparseLanes;
  uint8_t* columns = args.columns + start.word * kSparseLanes * kSparseWord;
  for (int64_t g = 0; g < layout.groups; ++g) {
    const uint16_t* rows = args.order.rows + index * layout.panel_rows + g * kSparseLanes;
    const int64_t steps = args.order.steps[index * layout.groups + g];
    for (int64_t lane = 0; lane < kSparseLanes; ++lane) {
      const int64_t n = rows[lane] < layout.panel_rows ? panel * layout.panel_rows + rows[lane] : -1;
      pack(args, n, block, steps, values + lane, columns + lane * kSparseWord);
    }
    values += steps * kSparseLanes;
    columns += (steps + kSparseWord - 1) / kSparseWord * kSparseLanes * kSparseWord;
  }
}

void sparse_pack(const SparsePack& args, int num_threads) {
  const SparseLayout layout = sparse_layout(args.order.N, args.order.K);
  std::vector<SparseStart> starts(static_cast<size_t>(layout.panels * layout.blocks + 1));
  sparse_starts(layout, args.order.steps, starts.data());
  parallel_for(layout.panels * layout.blocks, num_threads,
               [&](int64_t task, int) { sparse_pack_block(args, task, starts[static_cast<size_t>(task)]); });
}

}  // namespace dtm_fast
