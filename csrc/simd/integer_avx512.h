// One vector of 64 bytes, AVX-512 (F, BW, DQ, VL), with VNNI where INHIBITOR_VNNI says so.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Bytes {
  using Vector = __m512i;
  static constexpr int width = 64;
  // Register tiles: rows of a score tile; rows and atoms of 16 features of a value tile.
  static constexpr int score_rows = 4;
  static constexpr int value_rows = 8;
  static constexpr int value_atoms = 2;

  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Vector a) { _mm512_storeu_si512(p, a); }
  static Vector repeat8(const uint8_t* p) {
    int64_t bytes;
    std::memcpy(&bytes, p, 8);
    return _mm512_set1_epi64(bytes);
  }
  static Vector repeat4(const uint8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return _mm512_set1_epi32(bytes);
  }

  // x · inverse to the nearest integer, between `low` and 127, plus `zero`, as bytes; whether there is a NaN.
  static constexpr int64_t floats = 16;
  static bool quantise(const float* p, float inverse, float low, int32_t zero, uint8_t* to) {
    const __m512 x = _mm512_loadu_ps(p);
    const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(inverse));
    const __m512 inside = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_set1_ps(low)), _mm512_set1_ps(127.0f));
    const Vector code = _mm512_cvt_roundps_epi32(inside, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vector moved = _mm512_add_epi32(code, _mm512_set1_epi32(zero));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(moved));
    return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0;
  }

  // Σ|a − b| over every 8 bytes.
  static Vector distance(Vector a, Vector b) { return _mm512_sad_epu8(a, b); }
  // Four such sums as words: the first lane of each, then the second.
  static Vector join(Vector a, Vector b, Vector c, Vector d) {
    const Vector three = _mm512_ternarylogic_epi64(a, _mm512_slli_epi64(b, 16), _mm512_slli_epi64(c, 32), 0xFE);
    return _mm512_or_si512(three, _mm512_slli_epi64(d, 48));
  }

  static Vector words(int32_t x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
  // Saturated, as sub_words. For sums of distances too, which never are: distance() runs on one port, a plain addition
  // on that one or another, this one never on the same.
  static Vector add_words(Vector a, Vector b) { return _mm512_adds_epu16(a, b); }
  static Vector sub_words(Vector a, Vector b) { return _mm512_subs_epu16(a, b); }
  static Vector min_words(Vector a, Vector b) { return _mm512_min_epu16(a, b); }
  static Vector high_product(Vector a, Vector b) { return _mm512_mulhi_epu16(a, b); }
  static Vector left(Vector a, int32_t bits) { return _mm512_sll_epi16(a, _mm_cvtsi32_si128(bits)); }
  static Vector right(Vector a, int32_t bits) { return _mm512_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
  // Words as bytes, larger ones as 255.
  static void store_bytes(uint8_t* p, Vector a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtusepi16_epi8(a));
  }
  // Words less 2^15, added to 16 sums of 2^13 steps at most; and the total of those.
  static void add_to_sum(int32_t* sums, Vector a) {
    store(sums, dot_words(load(sums), _mm512_xor_si512(a, words(-32768)), words(1)));
  }
  static int64_t total_of(const int32_t* sums) {
    const Vector sum = load(sums);
    const Vector low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum));
    const Vector high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
  }

  // |a| less z, 0 where z is more.
  static Vector remainder(Vector magnitude, Vector z) { return _mm512_subs_epu8(magnitude, z); }
#if defined(INHIBITOR_VNNI)
  static constexpr const char* name = "avx512vnni";
  static Vector dot_words(Vector sum, Vector a, Vector b) { return _mm512_dpwssd_epi32(sum, a, b); }
  // sum + Σ a · sign over every four bytes; of 512 keys at most, then `totals` makes 32-bit numbers of it.
  static Vector add_signed(Vector sum, Vector a, Vector sign) {
#if defined(__GNUC__) && !defined(__clang__)
    // GCC 12 gives the intrinsic's result another register than its sum, and moves all sums of a tile in every step.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(sign));
    return sum;
#else
    return _mm512_dpbusd_epi32(sum, a, sign);
#endif
  }
  static Vector totals(Vector sum) { return sum; }
#else
  static constexpr const char* name = "avx512";
  static Vector dot_words(Vector sum, Vector a, Vector b) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
  }
  static Vector add_signed(Vector sum, Vector a, Vector sign) {
    return _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, sign));
  }
  static Vector totals(Vector sum) { return _mm512_madd_epi16(sum, words(1)); }
#endif
  static void add_totals(int32_t* p, Vector sum) { store(p, _mm512_add_epi32(load(p), totals(sum))); }
};

}  // namespace
