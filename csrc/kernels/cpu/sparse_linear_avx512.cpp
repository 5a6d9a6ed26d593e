#include <immintrin.h>

#include <cstring>

#include "avx512_vectors.h"
#include "sparse_linear.h"

namespace dtm_fast {
namespace {

constexpr int64_t kFewTokens = 3;
constexpr int64_t kPrefetchBytes = 1024;     // into the L1 cache
constexpr int64_t kFarPrefetchBytes = 4096;  // into the L2 cache

template <FloatType type>
void transpose_x_as(const void* x, int64_t x_stride, int64_t k0, int64_t depth, int64_t tokens, float* xt) {
  for (int64_t m = 0; m < kSparseTokens && m < tokens; m += 16) {
    for (int64_t k = 0; k < kSparseBlockRows; k += 16) {
      const __mmask16 lanes = k < depth ? first_lanes(depth - k) : __mmask16{0};
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        const void* row =
            static_cast<const char*>(x) + (m + i < tokens ? m + i : m) * x_stride * size_of(type);
        r[i] = _mm512_castps_si512(load_16<type>(row, k0 + k, m + i < tokens ? lanes : __mmask16{0}));
      }
      transpose_16x16(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(xt + (k + i) * kSparseTokens + m, r[i]);
    }
  }
}

void transpose_x(FloatType type, const void* x, int64_t x_stride, int64_t k0, int64_t depth, int64_t tokens,
                 float* xt) {
  type == FloatType::kFloat32 ? transpose_x_as<FloatType::kFloat32>(x, x_stride, k0, depth, tokens, xt)
                              : transpose_x_as<FloatType::kBfloat16>(x, x_stride, k0, depth, tokens, xt);
}

// The four columns of a row at a word.
uint32_t load_word(const uint8_t* columns) {
  uint32_t word;
  std::memcpy(&word, columns, sizeof word);
  return word;
}

// Fetches memory to be written, a share with each of the groups: all of it at once would wait for the memory.
class FetchToWrite {
 public:
  FetchToWrite(const SparseAhead& ahead, int64_t groups)
      : ahead_(ahead), share_((ahead.rows * ((ahead.row_bytes + 63) / 64) + groups - 1) / groups) {}

  void next_share() {
    for (int64_t i = 0; i < share_ && row_ < ahead_.rows; ++i) {
      // Not __builtin_prefetch, which without -mprfchw fetches to read only.
      asm volatile("prefetchw %0" : : "m"(ahead_.address[row_ * ahead_.stride + byte_]));
      byte_ += 64;
      if (byte_ < ahead_.row_bytes) continue;
      byte_ = 0;
      ++row_;
    }
  }

 private:
  const SparseAhead& ahead_;
  const int64_t share_;
  int64_t row_ = 0, byte_ = 0;
};

// kRows neighbours of a group at once, so that enough independent sums are under way.
template <int kVectors, int kRows, bool first>
void multiply_rows(const float* values, const uint8_t* columns, int64_t steps, const float* xt, float* c,
                   const uint16_t* rows, uint16_t last_row) {
  float* row[kRows];
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = c + (rows[r] < last_row ? rows[r] : last_row) * kSparseTokens;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = first ? _mm512_setzero_ps() : _mm512_load_ps(row[r] + 16 * v);
    }
  }
  const auto step = [&](int r, uint32_t column, const float* value) {
    // A byte of the weight cannot address more than the rows of xt, whatever it holds.
    const float* x = xt + (column & (kSparseBlockRows - 1)) * kSparseTokens;
    asm(""
        : "+r"(x));  // one register as address: with two, an instruction that also computes takes two slots
    const __m512 w = _mm512_set1_ps(*value);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = _mm512_fmadd_ps(w, _mm512_load_ps(x + 16 * v), sum[r][v]);
    }
  };
  constexpr int64_t kLine = kSparseLanes * kSparseWord;  // the same for four steps of values as for a word
  // The words are loaded four steps ahead: on Zen 5 the loop takes 6% longer where an address waits for
  // the load of its own word.
  uint32_t word[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) word[r] = steps > 0 ? load_word(columns + r * kSparseWord) : 0;
  for (; steps >= kSparseWord; steps -= kSparseWord, values += kLine) {
    columns += steps > kSparseWord ? kLine : 0;  // nothing is read beyond the last word
    uint32_t next[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) next[r] = load_word(columns + r * kSparseWord);
#pragma GCC unroll 4
    for (int j = 0; j < kSparseWord; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) step(r, word[r] >> (8 * j), values + j * kSparseLanes + r);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) word[r] = next[r];
  }
  for (; steps > 0; --steps, values += kSparseLanes) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      step(r, word[r], values + r);
      word[r] >>= 8;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(row[r] + 16 * v, sum[r][v]);
  }
}

template <int kVectors, int kRows, bool first>
void multiply_groups(const SparseBlock& block, const float* xt, const SparseAhead& y, float* c) {
  const float* values = block.values;
  const uint8_t* columns = block.columns;
  const auto last_row = static_cast<uint16_t>(block.groups * kSparseLanes);
  FetchToWrite fetch_y(y, block.groups);
  for (int64_t g = 0; g < block.groups; ++g) {
    fetch_y.next_share();
    const int64_t steps = block.steps[g];
    if (steps == 0 && !first) continue;
    for (int r = 0; r < kSparseLanes; r += kRows) {
      multiply_rows<kVectors, kRows, first>(values + r, columns + r * kSparseWord, steps, xt, c,
                                            block.rows + g * kSparseLanes + r, last_row);
    }
    values += steps * kSparseLanes;
    columns += (steps + kSparseWord - 1) / kSparseWord * kSparseLanes * kSparseWord;
  }
}

template <bool first>
void multiply_tokens(const SparseBlock& block, const float* xt, int64_t tokens, const SparseAhead& y,
                     float* c) {
  switch ((tokens + 15) / 16) {
    case 1:
      return multiply_groups<1, 4, first>(block, xt, y, c);
    case 2:
      return multiply_groups<2, 4, first>(block, xt, y, c);
    case 3:
      return multiply_groups<3, 4, first>(block, xt, y, c);
    default:
      return multiply_groups<4, 4, first>(block, xt, y, c);
  }
}

void multiply(const SparseBlock& block, const float* xt, int64_t tokens, bool first, const SparseAhead& y,
              float* c) {
  first ? multiply_tokens<true>(block, xt, tokens, y, c) : multiply_tokens<false>(block, xt, tokens, y, c);
}

void store_y(const float* c, int64_t rows, int64_t tokens, const float* bias, FloatType type, void* y,
             int64_t y_stride, int64_t n0) {
  // Along the rows of y, so that few of its pages are written at a time.
  for (int64_t m = 0; m < tokens; m += 16) {
    for (int64_t n = 0; n < rows; n += 16) {
      const __mmask16 lanes = first_lanes(rows - n);
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_load_si512(c + (n + i) * kSparseTokens + m);
      transpose_16x16(r);
      for (int64_t i = 0; i < 16 && m + i < tokens; ++i) {
        __m512 value = _mm512_castsi512_ps(r[i]);
        if (bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, bias + n0 + n));
        const int64_t at = (m + i) * y_stride + n0 + n;
        if (type == FloatType::kFloat32) {
          _mm512_mask_storeu_ps(static_cast<float*>(y) + at, lanes, value);
        } else {
          _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, lanes,
                                   _mm512_cvtepi32_epi16(bfloat16_lanes(value)));
        }
      }
    }
  }
}

// x at column `byte` of each lane's word, from the eight vectors of a block: two of them for each pair of
// bits 5 and 6 of the column. vpermi2ps looks at the low five bits only.
template <int byte>
__m512 x_at(const __m512 x[8], __m512i words) {
  const __m512i column = _mm512_srli_epi32(words, 8 * byte);
  const __mmask16 bit5 = _mm512_movepi32_mask(_mm512_slli_epi32(words, 26 - 8 * byte));
  const __mmask16 bit6 = _mm512_movepi32_mask(_mm512_slli_epi32(words, 25 - 8 * byte));
  const __m512 x0 = _mm512_permutex2var_ps(x[0], column, x[1]);
  const __m512 x1 = _mm512_permutex2var_ps(x[2], column, x[3]);
  const __m512 x2 = _mm512_permutex2var_ps(x[4], column, x[5]);
  const __m512 x3 = _mm512_permutex2var_ps(x[6], column, x[7]);
  return _mm512_mask_blend_ps(bit6, _mm512_mask_blend_ps(bit5, x0, x1), _mm512_mask_blend_ps(bit5, x2, x3));
}

void fetch_ahead(const float* values) {
  const char* line = reinterpret_cast<const char*>(values);
  _mm_prefetch(line + kPrefetchBytes, _MM_HINT_T0);
  _mm_prefetch(line + kFarPrefetchBytes, _MM_HINT_T1);
}

void fetch_ahead(const uint8_t* columns) {  // a line for every kSparseWord of values
  const char* line = reinterpret_cast<const char*>(columns);
  _mm_prefetch(line + kPrefetchBytes / kSparseWord, _MM_HINT_T0);
  _mm_prefetch(line + kFarPrefetchBytes / kSparseWord, _MM_HINT_T1);
}

// The sums of one token over the steps of one group.
__m512 add_group(const float* values, const uint8_t* columns, int64_t steps, const __m512 x[8], __m512 sum) {
  constexpr int64_t kLine = kSparseLanes * kSparseWord;
  for (; steps >= kSparseWord; steps -= kSparseWord, values += kLine, columns += kLine) {
    const __m512i words = _mm512_loadu_si512(columns);
    for (int64_t j = 0; j < kSparseWord; ++j) fetch_ahead(values + j * kSparseLanes);
    fetch_ahead(columns);
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(values), x_at<0>(x, words), sum);
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(values + 16), x_at<1>(x, words), sum);
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(values + 32), x_at<2>(x, words), sum);
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(values + 48), x_at<3>(x, words), sum);
  }
  if (steps > 0) {
    const __m512i words = _mm512_loadu_si512(columns);
    for (int64_t j = 0; j + 1 < kSparseWord; ++j) fetch_ahead(values + j * kSparseLanes);
    fetch_ahead(columns);
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(values), x_at<0>(x, words), sum);
    if (steps > 1) sum = _mm512_fmadd_ps(_mm512_loadu_ps(values + 16), x_at<1>(x, words), sum);
    if (steps > 2) sum = _mm512_fmadd_ps(_mm512_loadu_ps(values + 32), x_at<2>(x, words), sum);
  }
  return sum;
}

void multiply_few(const SparseBlock& block, const float* x, int64_t tokens, float* c, int64_t c_stride) {
  const float* values = block.values;
  const uint8_t* columns = block.columns;
  const __m512i last_row = _mm512_set1_epi32(static_cast<int>(block.groups * kSparseLanes));
  __m512 vectors[8];
  for (int i = 0; i < 8; ++i) vectors[i] = _mm512_loadu_ps(x + 16 * i);
  for (int64_t g = 0; g < block.groups; ++g) {
    const int64_t steps = block.steps[g];
    if (steps == 0) continue;
    const __m512i rows = _mm512_min_epu32(
        last_row, _mm512_cvtepu16_epi32(
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.rows + g * kSparseLanes))));
    for (int64_t m = 0; m < tokens; ++m) {
      if (tokens > 1) {
        for (int i = 0; i < 8; ++i) vectors[i] = _mm512_loadu_ps(x + m * kSparseBlockRows + 16 * i);
      }
      float* sums = c + m * c_stride;
      const __m512 sum = add_group(values, columns, steps, vectors, _mm512_i32gather_ps(rows, sums, 4));
      _mm512_i32scatter_ps(sums, rows, sum, 4);
    }
    values += steps * kSparseLanes;
    columns += (steps + kSparseWord - 1) / kSparseWord * kSparseLanes * kSparseWord;
  }
}

}  // namespace

const SparseKernels kSparseAvx512 = {transpose_x, multiply, store_y, multiply_few, kFewTokens};

}  // namespace dtm_fast
