// Inputs of linear layers on their grid: a factor for each feature, one zero point.
#pragma once

#include <bit>
#include <cstdint>

namespace {

// x · multiplier + zero to the nearest integer, ties to even, between 0 and 255. True if some x is NaN.
inline bool put_on_grid(const float* __restrict x, const float* __restrict multiplier, int32_t zero, int64_t count,
                        uint8_t* __restrict to) {
  constexpr float kMagic = 12582912.0f;  // 3 · 2^22: beside it a number has no digits behind the point
  const int32_t offset = zero - std::bit_cast<int32_t>(kMagic);
  const float low = static_cast<float>(-zero), high = static_cast<float>(255 - zero);
  int32_t nan = 0;
  for (int64_t i = 0; i < count; i++) {
    float scaled = x[i] * multiplier[i];
    scaled = scaled > low ? scaled : low;
    scaled = scaled < high ? scaled : high;
    nan |= x[i] != x[i];
    to[i] = static_cast<uint8_t>(std::bit_cast<int32_t>(scaled + kMagic) + offset);
  }
  return nan != 0;
}

}  // namespace
