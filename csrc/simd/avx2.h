// One vector of 8 floats, AVX2 with FMA.
#pragma once

#include <immintrin.h>
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

#include <array>
#include <cstdint>

#include "transpose.h"

namespace {

// AMD from Zen 3 on: two units do additions, minimum and maximum, two others multiply-additions.
inline bool is_zen3_or_newer() {
  uint32_t vendor[4], model[4];
#if defined(_MSC_VER)
  __cpuid(reinterpret_cast<int*>(vendor), 0);
  __cpuid(reinterpret_cast<int*>(model), 1);
#else
  __cpuid(0, vendor[0], vendor[1], vendor[2], vendor[3]);
  __cpuid(1, model[0], model[1], model[2], model[3]);
#endif
  const bool amd = vendor[1] == 0x68747541 && vendor[3] == 0x69746e65 && vendor[2] == 0x444d4163;  // AuthenticAMD
  return amd && (model[0] >> 8 & 15) + (model[0] >> 20 & 255) >= 0x19;
}

struct Simd {
  using Vector = __m256;
  using Mask = __m256;  // all bits of a lane, or none
  static constexpr const char* name = "avx2";
  static constexpr int width = 8;
  static constexpr int score_rows = 5;
  static constexpr int score_vectors = 2;
  static constexpr int value_vectors = 8;
  static constexpr int value_rows = 1;
  static constexpr int grad_rows = 4;
  static constexpr int distance_rows = 4;
  static constexpr float dense = 0.9f;  // share of Z > 0 from which a block is worked on whole (measured)
  static constexpr int transposed = 8;  // rows and columns that transpose() takes

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector set(float x) { return _mm256_set1_ps(x); }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
  static Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static Vector abs(Vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  // a, limited to [-z, z]; z >= 0. As integers: of the same sign, floats are in the order of their bits, and AMD has twice
  // as many units for it.
  static Vector clamp(Vector a, Vector z) {
    const __m256i low = _mm256_or_si256(_mm256_castps_si256(z), _mm256_set1_epi32(INT32_MIN));
    const __m256i above = _mm256_min_epu32(_mm256_castps_si256(a), low);
    return _mm256_castsi256_ps(_mm256_min_epi32(above, _mm256_castps_si256(z)));
  }
  // Whether sums of maxima are faster by multiply-additions, with 1, than by additions.
  static bool fuses() {
    static const bool answer = is_zen3_or_newer();
    return answer;
  }
  // 1 with the sign of a.
  static Vector signed_one(Vector a) {
    return _mm256_or_ps(_mm256_and_ps(a, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
  }
  // -1, 0 or 1; 0 for NaN.
  static Vector sign(Vector a) {
    const Mask nonzero = _mm256_cmp_ps(a, zero(), _CMP_NEQ_OQ);
    return _mm256_and_ps(signed_one(a), nonzero);
  }
  static Mask greater(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static Mask bits(uint32_t b) {
    const __m256i lane = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, lane));
  }
  static uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  static Vector where(Mask m, Vector a) { return _mm256_and_ps(m, a); }
  static Vector select(Mask m, Vector a, Vector b) { return _mm256_blendv_ps(b, a, m); }
  static Vector add_where(Mask m, Vector a, Vector b) { return add(a, where(m, b)); }
  static Vector fma_where(Mask m, Vector a, Vector b, Vector c) { return fma(where(m, a), b, c); }
  static float sum(Vector a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  static void transpose(const float* from, int64_t from_step, float* to, int64_t to_step) {
    transpose_8x8(from, from_step, to, to_step);
  }

  // Writes first + i for every bit i of b, one behind the other; up to 8 numbers are overwritten.
  static void compress(uint32_t* to, uint32_t b, uint32_t first) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&places[b])));
    const __m256i chosen = _mm256_add_epi32(index, _mm256_set1_epi32(static_cast<int>(first)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), chosen);
  }

  // For every eight bits the places of those that are set, a byte each, the lowest first.
  static constexpr auto places = [] {
    std::array<uint64_t, 256> table{};
    for (uint32_t b = 0; b < 256; b++) {
      for (uint64_t i = 8; i-- > 0;) {
        if (b >> i & 1) table[b] = table[b] << 8 | i;
      }
    }
    return table;
  }();
};

}  // namespace
