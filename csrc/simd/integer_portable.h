// One vector of 16 bytes in plain C++: loops that a compiler may make vectors of.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Bytes {
  struct Vector {
    union {
      uint8_t byte[16];
      uint16_t word[8];
      int32_t number[4];
    };
  };
  static constexpr const char* name = "portable";
  static constexpr int width = 16;
  static constexpr int64_t floats = 0;  // that quantise() takes
  static constexpr int score_rows = 2;
  static constexpr int value_rows = 2;
  static constexpr int value_atoms = 1;

  static Vector zero() { return {}; }
  static Vector load(const void* p) {
    Vector a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static void store(void* p, Vector a) { std::memcpy(p, &a, sizeof a); }
  static Vector repeat8(const uint8_t* p) {
    Vector a;
    for (int i = 0; i < 16; i++) a.byte[i] = p[i % 8];
    return a;
  }
  static Vector repeat4(const uint8_t* p) {
    Vector a;
    for (int i = 0; i < 16; i++) a.byte[i] = p[i % 4];
    return a;
  }

  static bool quantise(const float*, float, float, int32_t, uint8_t*) { return false; }

  // Σ|a − b| over every 8 bytes, in the first word of each.
  static Vector distance(Vector a, Vector b) {
    Vector sums{};
    for (int lane = 0; lane < 2; lane++) {
      int32_t sum = 0;
      for (int i = lane * 8; i < lane * 8 + 8; i++) {
        const int difference = a.byte[i] - b.byte[i];
        sum += difference < 0 ? -difference : difference;
      }
      sums.word[lane * 4] = static_cast<uint16_t>(sum);
    }
    return sums;
  }
  // Four such sums as words: the first lane of each, then the second.
  static Vector join(Vector a, Vector b, Vector c, Vector d) {
    Vector joined;
    for (int lane = 0; lane < 2; lane++) {
      joined.word[lane * 4] = a.word[lane * 4];
      joined.word[lane * 4 + 1] = b.word[lane * 4];
      joined.word[lane * 4 + 2] = c.word[lane * 4];
      joined.word[lane * 4 + 3] = d.word[lane * 4];
    }
    return joined;
  }

  template <class Each>
  static Vector each_word(Each at) {
    Vector a;
    for (int i = 0; i < 8; i++) a.word[i] = static_cast<uint16_t>(at(i));
    return a;
  }
  static Vector words(int32_t x) {
    return each_word([&](int) { return x; });
  }
  static Vector add_words(Vector a, Vector b) {
    return each_word([&](int i) { return a.word[i] + b.word[i] > 65535 ? 65535 : a.word[i] + b.word[i]; });
  }
  static Vector sub_words(Vector a, Vector b) {
    return each_word([&](int i) { return a.word[i] > b.word[i] ? a.word[i] - b.word[i] : 0; });
  }
  static Vector min_words(Vector a, Vector b) {
    return each_word([&](int i) { return a.word[i] < b.word[i] ? a.word[i] : b.word[i]; });
  }
  static Vector high_product(Vector a, Vector b) {
    return each_word([&](int i) { return (static_cast<uint32_t>(a.word[i]) * b.word[i]) >> 16; });
  }
  static Vector left(Vector a, int32_t bits) {
    return each_word([&](int i) { return a.word[i] << bits; });
  }
  static Vector right(Vector a, int32_t bits) {
    return each_word([&](int i) { return a.word[i] >> bits; });
  }
  // Words as bytes, larger ones as 255.
  static void store_bytes(uint8_t* p, Vector a) {
    for (int i = 0; i < 8; i++) p[i] = static_cast<uint8_t>(a.word[i] < 255 ? a.word[i] : 255);
  }
  // Words less 2^15, added to 4 sums of 2^14 steps at most; and the total of those.
  static void add_to_sum(int32_t* sums, Vector a) {
    for (int i = 0; i < 8; i++) sums[i / 2] += a.word[i] - 32768;
  }
  static int64_t total_of(const int32_t* sums) {
    int64_t total = 0;
    for (int lane = 0; lane < 4; lane++) total += sums[lane];
    return total;
  }

  // |a| less z, 0 where z is more.
  static Vector remainder(Vector magnitude, Vector z) {
    Vector rest;
    for (int i = 0; i < 16; i++) {
      const int left = magnitude.byte[i] - z.byte[i];
      rest.byte[i] = static_cast<uint8_t>(left > 0 ? left : 0);
    }
    return rest;
  }
  // sum + Σ a · sign over every four bytes.
  static Vector add_signed(Vector sum, Vector a, Vector sign) {
    for (int i = 0; i < 4; i++) {
      int32_t total = 0;
      for (int k = 0; k < 4; k++) total += a.byte[4 * i + k] * static_cast<int8_t>(sign.byte[4 * i + k]);
      sum.number[i] += total;
    }
    return sum;
  }
  static void add_totals(int32_t* p, Vector sum) {
    for (int i = 0; i < 4; i++) p[i] += sum.number[i];
  }
};

}  // namespace
