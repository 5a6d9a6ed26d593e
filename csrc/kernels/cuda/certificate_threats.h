// How many of a certificate's tokens new hidden states may have overtaken, and which, on the GPU.
#pragma once

#include <cstdint>

#include "../cpu/certificate_threats.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dtm_fast {

// Positions with 1 to 16 threats are class 0, those with up to 16^2 class 1, and so on. Each class has its
// own set of tokens, so that a position with many threats does not burden those with few.
constexpr int64_t kThreatClasses = 8;

// What one pass finds beside the threats, of R - 1 nearest tokens per position and V tokens.
//
// top, reference : [P] int64
// nearest        : [P, R - 1] int64
// mismatch       : [P] bool bytes: reference != top
// counts         : [R + 1 + kThreatClasses + C * W] int32, counts_size of them, where C is the number of
//                  classes up to R - 1 threats and W = ceil(V / 32):
//   [R + 1]            how many positions have so many threats; nothing at 0, which are all the others
//   [kThreatClasses]   how many tokens a class has
//   [C, W]             which, a bit each: of every position of the class the tokens that threaten it, top and
//                      reference. Positions with R threats, of which not all are known, are not there.
struct ThreatMarks {
  const int64_t* top;
  const int64_t* nearest;
  const int64_t* reference;
  int64_t V;
  uint8_t* mismatch;
  int32_t* counts;
  int64_t counts_size;
};

// threats as the CPU kernel counts them, up to the last bits of the float64 norm; R < 2^31. marks may be
// nullptr. Queued on the stream of the current device; does not wait. Throws std::runtime_error if a launch
// fails.
void certificate_threats_cuda(const CertificateThreats& args, const ThreatMarks* marks, CUstream_st* stream);

// The positions and tokens of neighbouring classes, in ascending order.
//
// threats, reference : [P] int64, as above
// bits               : [classes, ceil(V / 32)], those of ThreatMarks, from the first class on
// before             : [ceil(V / 32)] int32, working memory
// positions          : [rows] int64: those with least <= threats <= most, of which there are `rows`
// among              : [rows] int64: where their references are in ids
// ids                : [tokens] int64: the classes' tokens, of which there are at most so many; at the end
// the
//                      last is repeated, which wins no tie against itself
struct SelectThreatened {
  const int64_t* threats;
  const int64_t* reference;
  int64_t P, V;
  int64_t least, most;
  const uint32_t* bits;
  int64_t classes;
  int32_t* before;
  int64_t rows, tokens;
  int64_t* positions;
  int64_t* among;
  int64_t* ids;
};

// As above. One block: a few microseconds for a hundred thousand tokens.
void select_threatened_cuda(const SelectThreatened& args, CUstream_st* stream);

}  // namespace dtm_fast
