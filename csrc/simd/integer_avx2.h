// One vector of 32 bytes, AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Bytes {
  using Vector = __m256i;
  static constexpr const char* name = "avx2";
  static constexpr int width = 32;
  static constexpr int64_t floats = 0;  // that quantise() takes
  static constexpr int score_rows = 2;
  static constexpr int value_rows = 4;
  static constexpr int value_atoms = 1;

  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Vector a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static Vector repeat8(const uint8_t* p) {
    int64_t bytes;
    std::memcpy(&bytes, p, 8);
    return _mm256_set1_epi64x(bytes);
  }
  static Vector repeat4(const uint8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return _mm256_set1_epi32(bytes);
  }

  static bool quantise(const float*, float, float, int32_t, uint8_t*) { return false; }

  // Σ|a − b| over every 8 bytes.
  static Vector distance(Vector a, Vector b) { return _mm256_sad_epu8(a, b); }
  // Four such sums as words: the first lane of each, then the second.
  static Vector join(Vector a, Vector b, Vector c, Vector d) {
    return _mm256_or_si256(_mm256_or_si256(a, _mm256_slli_epi64(b, 16)),
                           _mm256_or_si256(_mm256_slli_epi64(c, 32), _mm256_slli_epi64(d, 48)));
  }

  static Vector words(int32_t x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
  static Vector add_words(Vector a, Vector b) { return _mm256_adds_epu16(a, b); }  // saturated
  static Vector sub_words(Vector a, Vector b) { return _mm256_subs_epu16(a, b); }
  static Vector min_words(Vector a, Vector b) { return _mm256_min_epu16(a, b); }
  static Vector high_product(Vector a, Vector b) { return _mm256_mulhi_epu16(a, b); }
  static Vector left(Vector a, int32_t bits) { return _mm256_sll_epi16(a, _mm_cvtsi32_si128(bits)); }
  static Vector right(Vector a, int32_t bits) { return _mm256_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
  // Words as bytes, larger ones as 255.
  static void store_bytes(uint8_t* p, Vector a) {
    const Vector small = min_words(a, words(255));  // packus takes words for signed ones
    const Vector bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(small, small), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
  }
  // Words less 2^15, added to 8 sums of 2^13 steps at most; and the total of those.
  static void add_to_sum(int32_t* sums, Vector a) {
    const Vector pairs = _mm256_madd_epi16(_mm256_xor_si256(a, words(-32768)), words(1));
    store(sums, _mm256_add_epi32(load(sums), pairs));
  }
  static int64_t total_of(const int32_t* sums) {
    int64_t total = 0;
    for (int lane = 0; lane < 8; lane++) total += sums[lane];
    return total;
  }

  // |a| less z, 0 where z is more.
  static Vector remainder(Vector magnitude, Vector z) { return _mm256_subs_epu8(magnitude, z); }
  // sum + Σ a · sign over every two bytes, in words; of 512 keys at most, then `add_totals` makes 32-bit numbers of it.
  static Vector add_signed(Vector sum, Vector a, Vector sign) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, sign));
  }
  static void add_totals(int32_t* p, Vector sum) {
    store(p, _mm256_add_epi32(load(p), _mm256_madd_epi16(sum, words(1))));
  }
};

}  // namespace
