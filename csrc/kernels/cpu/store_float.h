// Storing float32 results in the type of the output. Only for files compiled for the baseline.
#pragma once

#include <cstdint>
#include <cstring>

#include "float_type.h"

namespace dtm_fast {

// Round to nearest, ties to even; every NaN becomes the quiet NaN 0x7fc0, because rounding its bits could
// make an infinity of it.
inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  return (bits & 0x7fffffffu) > 0x7f800000u ? uint16_t{0x7fc0} : rounded;
}

inline float float_from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Stores count values as elements first, first + 1, ... of an array of `type`.
inline void store_floats(void* array, FloatType type, int64_t first, const float* values, int64_t count) {
  if (type == FloatType::kFloat32) {
    std::memcpy(static_cast<float*>(array) + first, values, static_cast<size_t>(count) * sizeof(float));
  } else {
    uint16_t* out = static_cast<uint16_t*>(array) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_bits(values[i]);
  }
}

}  // namespace dtm_fast
