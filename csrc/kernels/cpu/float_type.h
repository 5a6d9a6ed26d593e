// The floating-point types of activations and weights.
#pragma once

#include <cstdint>

namespace dtm_fast {

enum class FloatType : int { kFloat32 = 0, kBfloat16 = 1 };

// static: files for different instruction sets include this header, and a copy compiled for one of them must
// never be the one that the linker keeps for all.
static constexpr int64_t size_of(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

}  // namespace dtm_fast
