// Rows of strided tensors of any dtype, as float32 and back.
#pragma once

#include <cstring>
#include <type_traits>

#include "problem.h"

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Neither a NaN nor an infinity.
inline bool is_finite(float x) { return x - x == 0.0f; }

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

inline float from_float16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(x & 0x7FFF) << 13;
  uint32_t bits = rest + (112u << 23);  // another bias
  if ((x & 0x7C00) == 0x7C00) bits = rest | 0x7F800000;
  float result;
  if ((x & 0x7C00) == 0) {  // subnormal: a multiple of 2^-24
    result = static_cast<float>(x & 0x03FF) * (1.0f / 16777216.0f);
    std::memcpy(&bits, &result, 4);
  }
  bits |= sign;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (bits >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 65536 or more
  if (bits < 0x38800000) {                                              // below 2^-14: a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // the last bit of a number in [0.5, 1) is 2^-24: the addition rounds
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  bits += 0xFFF + ((bits >> 13) & 1) - (112u << 23);
  return static_cast<uint16_t>(sign | (bits >> 13));
}

inline char* at(const Strided& tensor, int64_t element_size, int64_t a, int64_t b, int64_t c) {
  return static_cast<char*>(tensor.data) +
         (a * tensor.stride[0] + b * tensor.stride[1] + c * tensor.stride[2]) * element_size;
}

inline int64_t size_of(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Copies of some hundred floats at most: a call of memcpy would take as long as the copy.
inline void copy(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + Simd::width <= count; i += Simd::width) Simd::store(to + i, Simd::load(from + i));
  for (; i < count; i++) to[i] = from[i];
}

// size elements, step apart, then zeros up to padded.
inline void read_row(const void* source, int64_t step, int64_t dtype, int64_t size, int64_t padded, float* row) {
  if (dtype == kFloat32) {
    const float* from = static_cast<const float*>(source);
    if (step == 1) {
      copy(from, size, row);
    } else {
      for (int64_t i = 0; i < size; i++) row[i] = from[i * step];
    }
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(source);
    if (dtype == kBfloat16) {
      for (int64_t i = 0; i < size; i++) row[i] = from_bfloat16(from[i * step]);
    } else {
      for (int64_t i = 0; i < size; i++) row[i] = from_float16(from[i * step]);
    }
  }
  for (int64_t i = size; i < padded; i++) row[i] = 0.0f;
}

inline void write_row(const float* row, int64_t dtype, int64_t size, void* target) {
  if (dtype == kFloat32) {
    copy(row, size, static_cast<float*>(target));
  } else {
    uint16_t* to = static_cast<uint16_t*>(target);
    if (dtype == kBfloat16) {
      for (int64_t i = 0; i < size; i++) to[i] = to_bfloat16(row[i]);
    } else {
      for (int64_t i = 0; i < size; i++) to[i] = to_float16(row[i]);
    }
  }
}

// Fetch floats into the second-level cache.
inline void prefetch(const float* from, int64_t count) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i, 0, 2);
#else
  (void)from;
  (void)count;
#endif
}

// Fetch floats that will be written: else a store waits for the line that it changes a part of.
inline void prefetch_target(const void* to, int64_t count) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(static_cast<const float*>(to) + i, 1, 3);
#else
  (void)to;
  (void)count;
#endif
}

// Calls work(group, r) for rows in groups as large as there are: group() is the number, a constant.
template <int Largest, int... Smaller, class Work>
inline void for_groups(int64_t rows, const Work& work, int64_t r = 0) {
  for (; r + Largest <= rows; r += Largest) work(std::integral_constant<int, Largest>{}, r);
  if constexpr (sizeof...(Smaller) > 0) for_groups<Smaller...>(rows, work, r);
}

// Memory handed out piece by piece, each on a cache line of its own. With a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
};

}  // namespace
