#include <limits>

#include "../kernels/cpu/store_float.h"
#include "check.h"

using namespace dtm_fast;

namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

int main() {
  CHECK(bfloat16_bits(1.0f) == 0x3f80);
  CHECK(bfloat16_bits(-0.0f) == 0x8000);
  CHECK(bfloat16_bits(from_bits(0x3f808000)) == 0x3f80);  // halfway: down to even
  CHECK(bfloat16_bits(from_bits(0x3f818000)) == 0x3f82);  // halfway: up to even
  CHECK(bfloat16_bits(from_bits(0x3f808001)) == 0x3f81);
  CHECK(bfloat16_bits(from_bits(0x3f817fff)) == 0x3f81);
  CHECK(bfloat16_bits(from_bits(0x00000001)) == 0x0000);
  CHECK(bfloat16_bits(from_bits(0x00018000)) == 0x0002);  // denormal
  CHECK(bfloat16_bits(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(bfloat16_bits(-std::numeric_limits<float>::infinity()) == 0xff80);
  CHECK(bfloat16_bits(from_bits(0x7f800001)) == 0x7fc0);  // its bits, rounded, would be infinity
  CHECK(bfloat16_bits(from_bits(0xffffffff)) == 0x7fc0);  // and these zero
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    CHECK(bfloat16_bits(float_from_bfloat16(static_cast<uint16_t>(bits))) == bits);
  }
}
