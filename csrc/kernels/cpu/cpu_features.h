// Which instruction sets this machine and its operating system can run.
#pragma once

namespace dtm_fast {

// Ordered: a machine that has one level has every lower one.
enum class CpuIsa : int {
  kNone = 0,        // no level below: the kernels of this library cannot run
  kAvx2 = 1,        // AVX2, FMA
  kAvx512 = 2,      // AVX-512 F, BW, VL, DQ
  kAvx512Vnni = 3,  // AVX-512 VNNI
  kAvx512Bf16 = 4,  // AVX-512 BF16, where it is faster than float32
  kAmx = 5,         // AMX-TILE, AMX-INT8, AMX-BF16, AVX-512 BF16
};

// The highest level that the CPU reports and whose registers the operating system saves.
CpuIsa detected_cpu_isa();

// Whether memory that is asked for long before its use comes fastest into the second-level cache (AMD's Zen 3
// and 4), not into the first (Zen 5), whose requests under way are too few there for both.
bool fetches_far_to_second_level();

// Throws std::invalid_argument unless kAvx2 <= isa <= detected_cpu_isa().
void require_cpu_isa(CpuIsa isa);

}  // namespace dtm_fast
