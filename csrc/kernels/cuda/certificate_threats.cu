#include "certificate_threats.h"
#include "launch.h"

namespace dtm_fast {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = 4;     // of a block, each with a position of its own
constexpr int kInFlight = 4;  // loads of either state that a thread has under way
// Of a multiprocessor. Without it the compiler takes 32 registers, in which no loads are under way together.
constexpr int kBlocks = 8;
constexpr int kSelectThreads = 1024;
constexpr int64_t kWordBits = 32;

// T is an unsigned integer of the size of an element: its bits.
template <typename T>
__device__ __forceinline__ double widened(T bits) {
  return static_cast<double>(__uint_as_float(sizeof(T) == 2 ? static_cast<uint32_t>(bits) << 16 : bits));
}

__device__ __forceinline__ double plus_square(double difference, double sum) {
  return __fma_rn(difference, difference, sum);
}

// The squared distance of what 4 bytes of two states hold, added to sum.
template <typename T>
__device__ __forceinline__ double plus_squares(uint32_t a, uint32_t b, double sum) {
  if constexpr (sizeof(T) == 2) {
    sum = plus_square(widened(static_cast<T>(a)) - widened(static_cast<T>(b)), sum);
    return plus_square(widened(static_cast<T>(a >> 16)) - widened(static_cast<T>(b >> 16)), sum);
  } else {
    return plus_square(widened(a) - widened(b), sum);
  }
}

// This lane's share of the squared distance. In float64, whose roundings the slack of the norm drowns:
// widening and the difference of two bfloat16 or float32 are exact but for 2^-53, and no square overflows.
template <typename T, bool kAligned>
__device__ __forceinline__ double squared_distance(const T* hidden, const T* base, int64_t D, int lane) {
  double sums[kInFlight] = {};
  if constexpr (kAligned) {
    constexpr int64_t kChunk = 16 / sizeof(T), kStep = 32 * kChunk;
    for (int64_t k = lane * kChunk; k < D; k += kInFlight * kStep) {
      uint4 a[kInFlight], b[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const bool inside = k + i * kStep < D;  // D is a multiple of kChunk
        a[i] = inside ? *reinterpret_cast<const uint4*>(hidden + k + i * kStep) : make_uint4(0, 0, 0, 0);
        b[i] = inside ? *reinterpret_cast<const uint4*>(base + k + i * kStep) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        sums[i] = plus_squares<T>(a[i].x, b[i].x, sums[i]);
        sums[i] = plus_squares<T>(a[i].y, b[i].y, sums[i]);
        sums[i] = plus_squares<T>(a[i].z, b[i].z, sums[i]);
        sums[i] = plus_squares<T>(a[i].w, b[i].w, sums[i]);
      }
    }
  } else {
    for (int64_t k = lane; k < D; k += kInFlight * 32) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (k + i * 32 < D)
          sums[i] = plus_square(widened(hidden[k + i * 32]) - widened(base[k + i * 32]), sums[i]);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

__device__ __forceinline__ int threat_class(int threats) { return max(31 - __clz(threats - 1), 0) / 4; }

// Marks a token; 1 if it was not marked yet. An id outside the vocabulary, which only a caller that skipped
// its checks can bring, writes nothing.
__device__ __forceinline__ int mark(uint32_t* bits, int64_t token, int64_t V) {
  if (token < 0 || token >= V) return 0;
  const uint32_t bit = 1u << (token % kWordBits);
  return (atomicOr(bits + token / kWordBits, bit) & bit) == 0 ? 1 : 0;
}

// A warp with a position that has threats.
__device__ __forceinline__ void mark_threats(const ThreatMarks& marks, int64_t p, int threats, int R,
                                             int lane) {
  if (lane == 0) atomicAdd(marks.counts + threats, 1);
  if (threats == R) return;
  const int of = threat_class(threats);
  int32_t* const tokens = marks.counts + R + 1;
  auto* const bits =
      reinterpret_cast<uint32_t*>(tokens + kThreatClasses) + of * ((marks.V + kWordBits - 1) / kWordBits);
  const int64_t* nearest = marks.nearest + p * (R - 1);
  int fresh = 0;
  for (int i = lane; i < threats; i += 32) fresh += mark(bits, nearest[i], marks.V);
  if (lane == 0) fresh += mark(bits, marks.top[p], marks.V) + mark(bits, marks.reference[p], marks.V);
  fresh = __reduce_add_sync(kAll, fresh);
  if (lane == 0 && fresh != 0) atomicAdd(tokens + of, fresh);
}

// A warp per position: it reads both states once, and needs no shared memory.
template <typename T, bool kAligned, bool kMark>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    certificate_threats_kernel(const CertificateThreats args, const ThreatMarks marks) {
  const int lane = static_cast<int>(threadIdx.x % 32), R = static_cast<int>(args.R);
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (p >= args.P) return;  // the whole warp
  double square = squared_distance<T, kAligned>(static_cast<const T*>(args.hidden) + p * args.hidden_stride,
                                                static_cast<const T*>(args.base) + p * args.D, args.D, lane);
  // Sums of two are the same in either order: every lane has the same bits at the end.
#pragma unroll
  for (int other = 16; other > 0; other /= 2) square += __shfl_xor_sync(kAll, square, other);
  // Not contracted: as norm_above rounds.
  const float norm = __double2float_rn(__dsqrt_rn(square));
  const float distance = __fadd_rn(__fmul_rn(norm, args.enlarged), args.added);
  const float* radius = args.radius + p * args.R;
  int proved = 0;
  for (int r = lane; r < R; r += 32) proved += distance < radius[r] ? 1 : 0;  // false if one is NaN
  const int threats = R - __reduce_add_sync(kAll, proved);
  if (lane == 0) args.threats[p] = threats;
  if constexpr (kMark) {
    if (lane == 0) marks.mismatch[p] = marks.reference[p] != marks.top[p] ? 1 : 0;
    if (threats > 0) mark_threats(marks, p, threats, R, lane);
  }
}

template <typename T>
void launch(const CertificateThreats& args, const ThreatMarks* marks, CUstream_st* stream) {
  const auto on_chunk = [](const void* address, int64_t elements) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0 && elements * int64_t{sizeof(T)} % 16 == 0;
  };
  const bool aligned = on_chunk(args.hidden, args.hidden_stride) && on_chunk(args.base, args.D);
  const auto kernel =
      marks != nullptr
          ? (aligned ? certificate_threats_kernel<T, true, true> : certificate_threats_kernel<T, false, true>)
          : (aligned ? certificate_threats_kernel<T, true, false>
                     : certificate_threats_kernel<T, false, false>);
  const auto blocks = static_cast<unsigned>((args.P + kWarps - 1) / kWarps);
  kernel<<<blocks, kWarps * 32, 0, stream>>>(args, marks != nullptr ? *marks : ThreatMarks{});
  check_cuda(cudaGetLastError(), "certificate_threats");
}

__device__ __forceinline__ int inclusive_sum(int value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAll, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// The sum of the values of the threads before this one, and of all; sums: one of each warp.
__device__ int exclusive_sum(int value, int (&sums)[kSelectThreads / 32], int* total) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int in_warp = inclusive_sum(value, lane);
  if (lane == 31) sums[warp] = in_warp;
  __syncthreads();
  const int of_warps = inclusive_sum(sums[lane], lane);
  __syncthreads();  // the next call writes to sums
  *total = __shfl_sync(kAll, of_warps, 31);
  const int before = __shfl_sync(kAll, of_warps, max(warp - 1, 0));
  return (warp > 0 ? before : 0) + in_warp - value;
}

__device__ __forceinline__ uint32_t bits_of(const SelectThreatened& args, int64_t word, int64_t words) {
  uint32_t bits = 0;
  for (int64_t each = 0; each < args.classes; ++each) bits |= args.bits[each * words + word];
  return bits;
}

// One block: what it does takes less time than to have several agree on who writes where.
__global__ void __launch_bounds__(kSelectThreads) select_threatened_kernel(const SelectThreatened args) {
  static_assert(kSelectThreads == 32 * 32, "a warp adds up the sums of all warps");
  __shared__ int sums[kSelectThreads / 32];
  const int64_t words = (args.V + kWordBits - 1) / kWordBits;
  int64_t found = 0;
  for (int64_t begin = 0; begin < words; begin += kSelectThreads) {
    const int64_t word = begin + threadIdx.x;
    uint32_t bits = word < words ? bits_of(args, word, words) : 0;
    int total;
    int64_t place = found + exclusive_sum(__popc(bits), sums, &total);
    if (word < words) args.before[word] = static_cast<int32_t>(place);
    for (; bits != 0 && place < args.tokens; bits &= bits - 1)
      args.ids[place++] = word * kWordBits + __ffs(static_cast<int>(bits)) - 1;
    found += total;
  }
  __syncthreads();  // ids and before are there
  const int64_t last = found > 0 && args.tokens > 0 ? args.ids[min(found, args.tokens) - 1] : 0;
  for (int64_t i = found + threadIdx.x; i < args.tokens; i += kSelectThreads) args.ids[i] = last;

  found = 0;
  for (int64_t begin = 0; begin < args.P; begin += kSelectThreads) {
    const int64_t p = begin + threadIdx.x;
    const int64_t threats = p < args.P ? args.threats[p] : 0;
    const bool chosen = p < args.P && threats >= args.least && threats <= args.most;
    int total;
    const int64_t place = found + exclusive_sum(chosen ? 1 : 0, sums, &total);
    if (chosen && place < args.rows) {
      const int64_t reference = args.reference[p];
      const bool inside = reference >= 0 && reference < args.V;  // as in mark
      const int64_t word = inside ? reference / kWordBits : 0;
      const uint32_t lower = (1u << (inside ? reference % kWordBits : 0)) - 1;
      args.positions[place] = p;
      args.among[place] = args.before[word] + __popc(bits_of(args, word, words) & lower);
    }
    found += total;
  }
}

}  // namespace

void certificate_threats_cuda(const CertificateThreats& args, const ThreatMarks* marks, CUstream_st* stream) {
  if (marks != nullptr)
    check_cuda(cudaMemsetAsync(marks->counts, 0,
                               static_cast<size_t>(marks->counts_size) * sizeof(*marks->counts), stream),
               "certificate_threats");
  if (args.P == 0) return;
  if (args.type == FloatType::kFloat32) {
    launch<uint32_t>(args, marks, stream);
  } else {
    launch<uint16_t>(args, marks, stream);
  }
}

void select_threatened_cuda(const SelectThreatened& args, CUstream_st* stream) {
  select_threatened_kernel<<<1, kSelectThreads, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "select_threatened");
}

}  // namespace dtm_fast
