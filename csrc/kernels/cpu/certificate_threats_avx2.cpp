#include <immintrin.h>

#include "certificate_threats.h"

namespace dtm_fast {
namespace {

__m128 load_4(const float* x) { return _mm_loadu_ps(x); }
__m128 load_4(const uint16_t* x) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
  return _mm_castsi128_ps(_mm_slli_epi32(bits, 16));
}

float load_1(const float* x) { return *x; }
float load_1(const uint16_t* x) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(uint32_t{*x} << 16))));
}

// Each difference and square is exact, or as float64 rounds it.
template <typename T>
double squared_distance(const T* a, const T* b, int64_t D) {
  constexpr int64_t kVectors = 4;
  __m256d sums[kVectors] = {};
  int64_t k = 0;
  for (; k + 4 * kVectors <= D; k += 4 * kVectors) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kVectors; ++i) {
      const __m256d difference =
          _mm256_sub_pd(_mm256_cvtps_pd(load_4(a + k + 4 * i)), _mm256_cvtps_pd(load_4(b + k + 4 * i)));
      sums[i] = _mm256_fmadd_pd(difference, difference, sums[i]);
    }
  }
  double lanes[4], sum = 0.0;
  _mm256_storeu_pd(lanes, _mm256_add_pd(_mm256_add_pd(sums[0], sums[1]), _mm256_add_pd(sums[2], sums[3])));
  for (double each : lanes) sum += each;
  for (; k < D; ++k) {
    const double difference = static_cast<double>(load_1(a + k)) - static_cast<double>(load_1(b + k));
    sum += difference * difference;
  }
  return sum;
}

template <typename T>
int64_t threats_of_position(const CertificateThreats& args, int64_t p) {
  const double square = squared_distance(static_cast<const T*>(args.hidden) + p * args.hidden_stride,
                                         static_cast<const T*>(args.base) + p * args.D, args.D);
  const float distance = static_cast<float>(__builtin_sqrt(square)) * args.enlarged + args.added;
  const float* radius = args.radius + p * args.R;
  const __m256 bound = _mm256_set1_ps(distance);
  int64_t proved = 0, r = 0;
  for (; r + 8 <= args.R; r += 8) {
    const __m256 is_proved = _mm256_cmp_ps(bound, _mm256_loadu_ps(radius + r), _CMP_LT_OQ);
    proved += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(is_proved)));
  }
  for (; r < args.R; ++r) proved += distance < radius[r] ? 1 : 0;
  return args.R - proved;
}

}  // namespace

int64_t threats_of_position_avx2(const CertificateThreats& args, int64_t p) {
  return args.type == FloatType::kFloat32 ? threats_of_position<float>(args, p)
                                          : threats_of_position<uint16_t>(args, p);
}

}  // namespace dtm_fast
