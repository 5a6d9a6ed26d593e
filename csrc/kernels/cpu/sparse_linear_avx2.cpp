#include <immintrin.h>

#include <cstring>

#include "avx2_vectors.h"
#include "sparse_linear.h"

namespace dtm_fast {
namespace {

constexpr int64_t kPassTokens = 32;  // four vectors for each of two rows: 8 of 16 registers hold sums

// Elements index .. index + 7 of a row, widened to float32; 0 from the count-th on, which are not read.
template <FloatType type>
__m256 load_up_to_8(const void* row, int64_t index, int64_t count) {
  alignas(32) char copy[32] = {};
  const char* source = static_cast<const char*>(row) + index * size_of(type);
  if (count < 8) {
    if (count > 0) std::memcpy(copy, source, static_cast<size_t>(count * size_of(type)));
    source = copy;
  }
  if (type == FloatType::kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(source));
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

template <FloatType type>
void transpose_x_as(const void* x, int64_t x_stride, int64_t k0, int64_t depth, int64_t tokens, float* xt) {
  for (int64_t m = 0; m < tokens; m += 8) {
    for (int64_t k = 0; k < kSparseBlockRows; k += 8) {
      __m256 r[8];
      for (int64_t i = 0; i < 8; ++i) {
        r[i] = _mm256_setzero_ps();
        if (m + i >= tokens) continue;
        r[i] = load_up_to_8<type>(static_cast<const char*>(x) + (m + i) * x_stride * size_of(type), k0 + k,
                                  depth - k);
      }
      transpose_8x8(r);
      for (int64_t i = 0; i < 8; ++i) _mm256_store_ps(xt + (k + i) * kSparseTokens + m, r[i]);
    }
  }
}

void transpose_x(FloatType type, const void* x, int64_t x_stride, int64_t k0, int64_t depth, int64_t tokens,
                 float* xt) {
  type == FloatType::kFloat32 ? transpose_x_as<FloatType::kFloat32>(x, x_stride, k0, depth, tokens, xt)
                              : transpose_x_as<FloatType::kBfloat16>(x, x_stride, k0, depth, tokens, xt);
}

// kRows neighbours of a group at once, so that enough independent sums are under way.
template <int kVectors, int kRows>
void multiply_rows(const float* values, const uint8_t* columns, int64_t steps, const float* xt, bool first,
                   float* c, const uint16_t* rows, uint16_t last_row) {
  float* row[kRows];
  __m256 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = c + (rows[r] < last_row ? rows[r] : last_row) * kSparseTokens;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = first ? _mm256_setzero_ps() : _mm256_load_ps(row[r] + 8 * v);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* word = columns + s / kSparseWord * kSparseLanes * kSparseWord + s % kSparseWord;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      // A byte of the weight cannot address more than the rows of xt, whatever it holds.
      const float* x = xt + (word[r * kSparseWord] & (kSparseBlockRows - 1)) * kSparseTokens;
      const __m256 w = _mm256_set1_ps(values[s * kSparseLanes + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = _mm256_fmadd_ps(w, _mm256_load_ps(x + 8 * v), sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm256_store_ps(row[r] + 8 * v, sum[r][v]);
  }
}

template <int kVectors, int kRows>
void multiply_groups(const SparseBlock& block, const float* xt, bool first, float* c) {
  const float* values = block.values;
  const uint8_t* columns = block.columns;
  const auto last_row = static_cast<uint16_t>(block.groups * kSparseLanes);
  for (int64_t g = 0; g < block.groups; ++g) {
    const int64_t steps = block.steps[g];
    for (int r = 0; (steps > 0 || first) && r < kSparseLanes; r += kRows) {
      multiply_rows<kVectors, kRows>(values + r, columns + r * kSparseWord, steps, xt, first, c,
                                     block.rows + g * kSparseLanes + r, last_row);
    }
    values += steps * kSparseLanes;
    columns += (steps + kSparseWord - 1) / kSparseWord * kSparseLanes * kSparseWord;
  }
}

void multiply(const SparseBlock& block, const float* xt, int64_t tokens, bool first, const SparseAhead&,
              float* c) {
  for (int64_t m = 0; m < tokens; m += kPassTokens) {
    switch ((tokens - m + 7) / 8) {
      case 1:
        multiply_groups<1, 8>(block, xt + m, first, c + m);
        break;
      case 2:
        multiply_groups<2, 4>(block, xt + m, first, c + m);
        break;
      case 3:
        multiply_groups<3, 2>(block, xt + m, first, c + m);
        break;
      default:
        multiply_groups<4, 2>(block, xt + m, first, c + m);
    }
  }
}

// Eight bfloat16, rounded as store_float.h rounds.
__m128i bfloat16_bits(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}

void store_y(const float* c, int64_t rows, int64_t tokens, const float* bias, FloatType type, void* y,
             int64_t y_stride, int64_t n0) {
  // Along the rows of y, so that few of its pages are written at a time.
  for (int64_t m = 0; m < tokens; m += 8) {
    for (int64_t n = 0; n < rows; n += 8) {
      const int64_t count = rows - n < 8 ? rows - n : 8;
      const __m256 added =
          bias == nullptr ? _mm256_setzero_ps() : load_up_to_8<FloatType::kFloat32>(bias, n0 + n, count);
      __m256 r[8];
      for (int64_t i = 0; i < 8; ++i) r[i] = _mm256_load_ps(c + (n + i) * kSparseTokens + m);
      transpose_8x8(r);
      for (int64_t i = 0; i < 8 && m + i < tokens; ++i) {
        const __m256 value = bias == nullptr ? r[i] : _mm256_add_ps(r[i], added);
        alignas(32) char out[32];
        if (type == FloatType::kFloat32) {
          _mm256_store_ps(reinterpret_cast<float*>(out), value);
        } else {
          _mm_store_si128(reinterpret_cast<__m128i*>(out), bfloat16_bits(value));
        }
        std::memcpy(static_cast<char*>(y) + ((m + i) * y_stride + n0 + n) * size_of(type), out,
                    static_cast<size_t>(count * size_of(type)));
      }
    }
  }
}

}  // namespace

const SparseKernels kSparseAvx2 = {transpose_x, multiply, store_y, nullptr, 0};

}  // namespace dtm_fast
