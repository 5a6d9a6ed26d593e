// Float32 in pieces, see float32_pieces.h. Included only by files compiled for at least AVX-512; everything
// is in an anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

#include "avx512_vectors.h"
#include "float32_pieces.h"

namespace dtm_fast {
namespace {

// The products of a step: which piece of the weight and which of x. Each but the last but one shares a piece
// with the one before.
constexpr int kPieceProducts = 6;
constexpr int kProductWeight[kPieceProducts] = {2, 1, 1, 0, 0, 0};
constexpr int kProductX[kPieceProducts] = {0, 0, 1, 1, 0, 2};

// While an object of this class lives, denormal numbers are taken as zero everywhere, as they are by the
// tiles.
class DenormalsAreZero {
 public:
  DenormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushResults | kZeroOperands); }
  ~DenormalsAreZero() { _mm_setcsr(before_); }
  DenormalsAreZero(const DenormalsAreZero&) = delete;
  DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

 private:
  static constexpr unsigned kFlushResults = 0x8000, kZeroOperands = 0x0040;
  const unsigned before_;
};

// The pieces of 32 neighbours: those of k are the upper words of low and high, the lower words are zero.
struct Float32Pieces {
  __m512i low[kFloat32Pieces], high[kFloat32Pieces];
};

// piece[1] and [2] of x, of which piece[0] is known.
DTM_FAST_INLINE void split_rest(__m512 x, __m512i piece[kFloat32Pieces]) {
  const __m512i upper_words = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 left = _mm512_sub_ps(x, _mm512_castsi512_ps(piece[0]));
  piece[1] = _mm512_and_si512(_mm512_castps_si512(left), upper_words);
  piece[2] = _mm512_castps_si512(_mm512_sub_ps(left, _mm512_castsi512_ps(piece[1])));
}

DTM_FAST_INLINE void split_weight(__m512 weight, __m512i piece[kFloat32Pieces]) {
  const __m512i upper_words = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  piece[0] = _mm512_and_si512(_mm512_castps_si512(weight), upper_words);
  split_rest(weight, piece);
}

// Near the largest number, piece[0] becomes infinite.
DTM_FAST_INLINE void split_x(__m512 x, __m512i piece[kFloat32Pieces]) {
  const __m512i upper_words = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i carried = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  piece[0] = _mm512_and_si512(carried, upper_words);
  split_rest(x, piece);
}

DTM_FAST_INLINE Float32Pieces split_weights(__m512 low, __m512 high) {
  Float32Pieces pieces;
  split_weight(low, pieces.low);
  split_weight(high, pieces.high);
  return pieces;
}

// Piece p as pairs of k and k + 16; zeros for those that are not kept.
DTM_FAST_INLINE __m512i pairs_of(const Float32Pieces& pieces, int p, __mmask32 kept) {
  const __m512i low = _mm512_maskz_srli_epi32(static_cast<__mmask16>(kept), pieces.low[p], 16);
  return _mm512_mask_or_epi32(low, static_cast<__mmask16>(kept >> 16), low, pieces.high[p]);
}

}  // namespace
}  // namespace dtm_fast
