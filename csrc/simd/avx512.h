// One vector of 16 floats, AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "transpose.h"

namespace {

struct Simd {
  using Vector = __m512;
  using Mask = __mmask16;
  static constexpr const char* name = "avx512";
  static constexpr int width = 16;
  // Register tiles: vectors of keys in a score tile, vectors of a value row held at once, rows that share them.
  static constexpr int score_rows = 4;
  static constexpr int score_vectors = 4;
  static constexpr int value_vectors = 4;
  static constexpr int value_rows = 4;
  static constexpr int grad_rows = 12;
  static constexpr int distance_rows = 8;
  static constexpr float dense = 0.7f;  // share of Z > 0 from which a block is worked on whole (measured)
  static constexpr int transposed = 8;  // rows and columns that transpose() takes

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector set(float x) { return _mm512_set1_ps(x); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Vector abs(Vector a) { return _mm512_abs_ps(a); }
  // a, limited to [-z, z]; z >= 0.
  static Vector clamp(Vector a, Vector z) { return _mm512_range_ps(a, z, 0x02); }
  static constexpr bool fuses() { return false; }  // sums of maxima by multiply-additions; on Intel there is no difference
  // 1 with the sign of a.
  static Vector signed_one(Vector a) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN),
                                                         _mm512_castps_si512(_mm512_set1_ps(1.0f)), 0xEA));
  }
  // -1, 0 or 1; 0 for NaN.
  static Vector sign(Vector a) {
    // Class of a, four bits each: NaN 0, zero 0, one 1, -inf -1, +inf 1, negative -1, positive 1.
    return _mm512_fixupimm_ps(a, a, _mm512_set1_epi32(static_cast<int>(0xA9A9A888)), 0);
  }
  static Mask greater(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
  static Mask bits(uint32_t b) { return static_cast<Mask>(b); }
  static uint32_t bits(Mask m) { return m; }
  static Vector where(Mask m, Vector a) { return _mm512_maskz_mov_ps(m, a); }
  static Vector select(Mask m, Vector a, Vector b) { return _mm512_mask_mov_ps(b, m, a); }
  static Vector add_where(Mask m, Vector a, Vector b) { return _mm512_mask_add_ps(a, m, a, b); }
  static Vector fma_where(Mask m, Vector a, Vector b, Vector c) { return _mm512_mask3_fmadd_ps(a, b, c, m); }
  static float sum(Vector a) { return _mm512_reduce_add_ps(a); }

  static void transpose(const float* from, int64_t from_step, float* to, int64_t to_step) {
    transpose_8x8(from, from_step, to, to_step);
  }

  // Writes first + i for every bit i of b, one behind the other; up to 16 numbers are overwritten.
  static void compress(uint32_t* to, uint32_t b, uint32_t first) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lane);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(bits(b), index));
  }
};

}  // namespace
