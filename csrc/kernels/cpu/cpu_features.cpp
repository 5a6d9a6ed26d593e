#include "cpu_features.h"

#include <cpuid.h>

#include <cstdint>
#include <stdexcept>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dtm_fast {
namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return Registers{};
  return r;
}

// Inline assembly, not _xgetbv(): the intrinsic needs -mxsave, and this file is compiled for the baseline.
uint64_t extended_control_register_0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux gives a process the 8 KiB of tile registers only when it asks (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

// AMD multiplies twice as many bfloat16 as float32 in a cycle (Zen 4 and 5); Intel without its tiles half as
// many, so that widening them is faster there.
bool is_amd() {
  const Registers leaf0 = cpuid(0, 0);
  return leaf0.ebx == signature_AMD_ebx && leaf0.ecx == signature_AMD_ecx && leaf0.edx == signature_AMD_edx;
}

// AMD64 Architecture Programmer's Manual vol. 3, CPUID function 1: 0x19 is Zen 3 and 4, 0x1a Zen 5.
uint32_t family() {
  const uint32_t eax = cpuid(1, 0).eax;
  return (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
}

bool has(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }

// Intel SDM vol. 1, sections 14.3, 14.7.1 and 15.2: CPUID says what the CPU has, XCR0 what the operating
// system saves. Without the second test the kernels fault on systems that leave AVX off.
CpuIsa detect() {
  const Registers leaf1 = cpuid(1, 0);
  if (!has(leaf1.ecx, bit_OSXSAVE | bit_AVX | bit_FMA)) return CpuIsa::kNone;
  const uint64_t xcr0 = extended_control_register_0();
  constexpr uint64_t kYmmState = 0x06;  // XMM and upper halves of YMM
  constexpr uint64_t kZmmState = 0xe6;  // the same, opmask, upper halves of ZMM0-15, ZMM16-31
  const Registers leaf7 = cpuid(7, 0);
  if ((xcr0 & kYmmState) != kYmmState || !has(leaf7.ebx, bit_AVX2)) return CpuIsa::kNone;
  if ((xcr0 & kZmmState) != kZmmState ||
      !has(leaf7.ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ)) {
    return CpuIsa::kAvx2;
  }
  if (!has(leaf7.ecx, bit_AVX512VNNI)) return CpuIsa::kAvx512;
  if (!has(cpuid(7, 1).eax, bit_AVX512BF16)) return CpuIsa::kAvx512Vnni;
  constexpr uint64_t kTileState = 0x60000;  // tile configuration and tile data
  if ((xcr0 & kTileState) == kTileState && has(leaf7.edx, bit_AMX_TILE | bit_AMX_INT8 | bit_AMX_BF16) &&
      has(leaf7.ebx, bit_BMI2) && may_use_tiles()) {
    return CpuIsa::kAmx;
  }
  return is_amd() ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512Vnni;
}

}  // namespace

CpuIsa detected_cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

bool fetches_far_to_second_level() {
  static const bool second_level = is_amd() && family() == 0x19;
  return second_level;
}

void require_cpu_isa(CpuIsa isa) {
  if (isa < CpuIsa::kAvx2 || isa > detected_cpu_isa()) {
    throw std::invalid_argument("this machine cannot run the kernels of the instruction set asked for");
  }
}

}  // namespace dtm_fast
