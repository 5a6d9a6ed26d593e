// Loops that do nothing but one instruction of interest, to measure what the machine can do at most.
//
// Each runs `iterations` times over independent accumulators that stay in registers and returns a number that
// depends on all of them, so that the compiler can remove nothing. `seed` points at 1024 random floats in
// [0.5, 1): finite sums, no denormals, and bytes that are not all alike (power depends on the data).
//
// Every loop over accumulators is unrolled, before and after the timed one too: an array that is indexed once
// by a variable lives in memory, and GCC 12 then stores every accumulator in every iteration, which halves
// the peak.
#pragma once

#include <cstdint>

namespace dtm_fast::bench {

using PeakLoop = double (*)(int64_t iterations, const float* seed);

// Arithmetic operations (a multiplication and an addition count as two) per iteration.
constexpr int64_t kFmaAvx2Ops = 12 * 8 * 2;
constexpr int64_t kFmaAvx512Ops = 20 * 16 * 2;
constexpr int64_t kDotBf16Ops = 20 * 32 * 2;
constexpr int64_t kDotInt8Ops = 20 * 64 * 2;
constexpr int64_t kAmxBf16Ops = 4 * 16 * 16 * 32 * 2;
constexpr int64_t kAmxInt8Ops = 4 * 16 * 16 * 64 * 2;

double fma_avx2(int64_t iterations, const float* seed);
double fma_avx512(int64_t iterations, const float* seed);
double dot_bf16_avx512_bf16(int64_t iterations, const float* seed);
double dot_int8_avx512_vnni(int64_t iterations, const float* seed);
double dot_bf16_amx(int64_t iterations, const float* seed);
double dot_int8_amx(int64_t iterations, const float* seed);

// Reads `bytes` (a multiple of 512) once, from memory of any alignment of 64.
uint64_t read_avx2(const void* memory, int64_t bytes);
uint64_t read_avx512(const void* memory, int64_t bytes);

}  // namespace dtm_fast::bench
