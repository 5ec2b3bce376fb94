// Numbers as they are stored, float32 or bfloat16; all arithmetic is float32.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace reft {

constexpr int64_t kLeastParallel = 16384;  // numbers for which waking other threads pays

struct bfloat16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, bfloat16* to) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  const uint32_t rounded = wide + 0x7fff + ((wide >> 16) & 1);  // to nearest, ties to even
  to->bits = value != value ? 0x7fc0 : uint16_t(rounded >> 16);
}

// e^x as 2^whole · 2^rest, the latter by a polynomial (minimax on [0, 1), error 2e-7). For x <= 0
// or moderate; below -87 it stays at about 1e-38. Branch-free, so that loops over it vectorise.
inline float exponential(float x) {
  const float scaled = std::min(std::max(x, -87.0f), 88.0f) * 1.44269504f;
  const float whole = __builtin_floorf(scaled), rest = scaled - whole;
  float power = 1.8775767e-3f;
  power = power * rest + 8.9893397e-3f;
  power = power * rest + 5.5826318e-2f;
  power = power * rest + 2.4015361e-1f;
  power = power * rest + 6.9315308e-1f;
  power = power * rest + 9.9999994e-1f;
  const int32_t exponent = (int32_t(whole) + 127) * (1 << 23);
  float factor;
  std::memcpy(&factor, &exponent, sizeof factor);
  return x == x ? power * factor : x;
}

}  // namespace reft
