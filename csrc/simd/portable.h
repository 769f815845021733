// One vector of floats in plain C++: four, with the compiler's vectors (SSE2, NEON) where it has them.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Simd {
  static constexpr const char* name = "portable";
  static constexpr int width = 4;
  static constexpr int score_rows = 4;
  static constexpr int score_vectors = 4;
  static constexpr int value_vectors = 4;
  static constexpr int value_rows = 2;
  static constexpr int grad_rows = 4;
  static constexpr int distance_rows = 4;
  static constexpr float dense = 0.9f;  // share of Z > 0 from which a block is worked on whole
  static constexpr int transposed = 4;  // rows and columns that transpose() takes

#if defined(__GNUC__)
  typedef float Vector __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));  // all bits of a lane, or none

  static Vector set(float x) { return Vector{x, x, x, x}; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector sub(Vector a, Vector b) { return a - b; }
  static Vector mul(Vector a, Vector b) { return a * b; }
  static Vector min(Vector a, Vector b) { return a < b ? a : b; }
  static Vector max(Vector a, Vector b) { return a > b ? a : b; }
  static Mask greater(Vector a, Vector b) { return a > b; }
  static Mask both(Mask a, Mask b) { return a & b; }
  static Vector select(Mask m, Vector a, Vector b) { return m ? a : b; }
#else
  struct Vector {
    float lane[4];
    float operator[](int i) const { return lane[i]; }
  };
  struct Mask {
    int32_t lane[4];
    int32_t operator[](int i) const { return lane[i]; }
    int32_t& operator[](int i) { return lane[i]; }
  };

  template <class Each>
  static Vector each(Each at) {
    return {{at(0), at(1), at(2), at(3)}};
  }
  static Vector set(float x) { return {{x, x, x, x}}; }
  static Vector add(Vector a, Vector b) {
    return each([&](int i) { return a[i] + b[i]; });
  }
  static Vector sub(Vector a, Vector b) {
    return each([&](int i) { return a[i] - b[i]; });
  }
  static Vector mul(Vector a, Vector b) {
    return each([&](int i) { return a[i] * b[i]; });
  }
  static Vector min(Vector a, Vector b) {
    return each([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
  }
  static Vector max(Vector a, Vector b) {
    return each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
  }
  static Mask greater(Vector a, Vector b) {
    Mask m{};
    for (int i = 0; i < 4; i++) m[i] = a[i] > b[i] ? -1 : 0;
    return m;
  }
  static Mask both(Mask a, Mask b) {
    Mask m{};
    for (int i = 0; i < 4; i++) m[i] = a[i] & b[i];
    return m;
  }
  static Vector select(Mask m, Vector a, Vector b) {
    return each([&](int i) { return m[i] ? a[i] : b[i]; });
  }
#endif

  static Vector zero() { return set(0.0f); }
  static Vector load(const float* p) {
    Vector x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }
  static Vector fma(Vector a, Vector b, Vector c) { return add(mul(a, b), c); }
  static Vector abs(Vector a) { return max(a, sub(zero(), a)); }
  // a, limited to [-z, z]; z >= 0.
  static Vector clamp(Vector a, Vector z) { return max(min(a, z), sub(zero(), z)); }
  static constexpr bool fuses() { return false; }  // sums of maxima by multiply-additions
  // 1 with the sign of a.
  static Vector signed_one(Vector a) { return select(greater(zero(), a), set(-1.0f), set(1.0f)); }
  // -1, 0 or 1; 0 for NaN.
  static Vector sign(Vector a) { return sub(where(greater(a, zero()), set(1.0f)), where(greater(zero(), a), set(1.0f))); }
  static Mask bits(uint32_t b) {
    Mask m{};
    for (int i = 0; i < 4; i++) m[i] = (b >> i) & 1 ? -1 : 0;
    return m;
  }
  static uint32_t bits(Mask m) {
    return static_cast<uint32_t>((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8));
  }
  static Vector where(Mask m, Vector a) { return select(m, a, zero()); }
  static Vector add_where(Mask m, Vector a, Vector b) { return add(a, where(m, b)); }
  static Vector fma_where(Mask m, Vector a, Vector b, Vector c) { return fma(where(m, a), b, c); }
  static float sum(Vector a) { return (a[0] + a[2]) + (a[1] + a[3]); }

  static void transpose(const float* from, int64_t from_step, float* to, int64_t to_step) {
    for (int i = 0; i < 4; i++) {
      for (int j = 0; j < 4; j++) to[j * to_step + i] = from[i * from_step + j];
    }
  }

  // Writes first + i for every bit i of b, one behind the other; up to 4 numbers are overwritten.
  static void compress(uint32_t* to, uint32_t b, uint32_t first) {
    for (uint32_t i = 0; i < 4; i++) {
      *to = first + i;
      to += (b >> i) & 1;
    }
  }
};

}  // namespace
