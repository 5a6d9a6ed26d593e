#include "avx512_vectors.h"
#include "certificate_threats.h"

namespace dtm_fast {
namespace {

// sum += (a - b)^2 in float64, where each is exact but for the sum.
inline __m512d add_square(__m256 a, __m256 b, __m512d sum) {
  const __m512d difference = _mm512_sub_pd(_mm512_cvtps_pd(a), _mm512_cvtps_pd(b));
  return _mm512_fmadd_pd(difference, difference, sum);
}

template <FloatType type>
double squared_distance(const void* a, const void* b, int64_t D) {
  constexpr int64_t kAheadBytes = 2048;  // rows follow each other, and none is long enough for the hardware
  __m512d sums[4] = {};
  for (int64_t k = 0; k < D; k += 32) {
    for (int64_t line = 0; line < 32 * size_of(type); line += 64) {
      _mm_prefetch(static_cast<const char*>(a) + k * size_of(type) + kAheadBytes + line, _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = k + 16 * half;
      const __mmask16 lanes = first_lanes(at < D ? D - at : 0);
      const __m512 x = load_16<type>(a, at, lanes), y = load_16<type>(b, at, lanes);
      sums[2 * half] = add_square(_mm512_castps512_ps256(x), _mm512_castps512_ps256(y), sums[2 * half]);
      sums[2 * half + 1] =
          add_square(_mm512_extractf32x8_ps(x, 1), _mm512_extractf32x8_ps(y, 1), sums[2 * half + 1]);
    }
  }
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_add_pd(sums[0], sums[1]), _mm512_add_pd(sums[2], sums[3])));
}

template <FloatType type>
int64_t threats_of_position(const CertificateThreats& args, int64_t p) {
  const char* hidden = static_cast<const char*>(args.hidden) + p * args.hidden_stride * size_of(type);
  const char* base = static_cast<const char*>(args.base) + p * args.D * size_of(type);
  const __m128d square = _mm_set_sd(squared_distance<type>(hidden, base, args.D));
  const __m128 norm = _mm_cvtsd_ss(_mm_setzero_ps(), _mm_sqrt_sd(square, square));
  const __m512 distance = _mm512_set1_ps(_mm_cvtss_f32(norm) * args.enlarged + args.added);
  const float* radius = args.radius + p * args.R;
  int64_t proved = 0;
  for (int64_t r = 0; r < args.R; r += 16) {
    const __mmask16 lanes = first_lanes(args.R - r);
    const __m512 radii = _mm512_maskz_loadu_ps(lanes, radius + r);
    proved += __builtin_popcount(_mm512_mask_cmp_ps_mask(lanes, distance, radii, _CMP_LT_OQ));
  }
  return args.R - proved;
}

}  // namespace

int64_t threats_of_position_avx512(const CertificateThreats& args, int64_t p) {
  return args.type == FloatType::kFloat32 ? threats_of_position<FloatType::kFloat32>(args, p)
                                          : threats_of_position<FloatType::kBfloat16>(args, p);
}

}  // namespace dtm_fast
