// What the loops need beyond CpuIsa: no kernel uses these instructions yet, but the limits show them.
#pragma once

namespace dtm_fast::bench {

bool has_avx512_bf16();
// AMX-BF16 on top of CpuIsa::kAmx (which has asked Linux for the tile registers).
bool has_amx_bf16();

}  // namespace dtm_fast::bench
