// Numbers on their grid, and the packed layout of keys and values: the same for every instruction set, because caches
// are kept in it.
//
// Panels of 32 keys. A panel of keys is (groups of 8 features, 4, 8, 8 features): the keys 4 k + a for a in 0..3, k in
// 0..7, so that four sums of one lane for each key make 32 words in order. A panel of values is (slices of 16 features,
// 8 quads of keys, 16 features, 4 keys).
#pragma once

#include <bit>

#include "integer.h"
#include "keys.h"

namespace {

constexpr int64_t kPanelKeys = 32;
constexpr int64_t kAtom = 64;  // bytes: 8 keys × 8 features, or 16 features × 4 keys

inline int64_t key_groups(const Problem& p) { return (p.head_dim + 7) / 8; }
inline int64_t value_slices(const Problem& p) { return (p.value_dim + 15) / 16; }
inline int64_t key_panel_bytes(const Problem& p) { return key_groups(p) * kPanelKeys * 8; }
inline int64_t value_panel_bytes(const Problem& p) { return value_slices(p) * kPanelKeys * 16; }

// x · inverse to the nearest integer, ties to even, between `low` and 127, plus `zero`. True if some x is NaN.
inline bool quantise(const float* __restrict from, int64_t count, float inverse, float low, int32_t zero,
                     uint8_t* __restrict to) {
  constexpr float kMagic = 12582912.0f;  // 3 · 2^22: beside it a number has no digits behind the point
  const int32_t offset = zero - std::bit_cast<int32_t>(kMagic);
  int32_t nan = 0;
  int64_t i = 0;
  for (; Bytes::floats && i + Bytes::floats <= count; i += Bytes::floats) {
    nan |= Bytes::quantise(from + i, inverse, low, zero, to + i);
  }
  for (; i < count; i++) {
    const float x = from[i];
    float scaled = x * inverse;
    scaled = scaled > low ? scaled : low;
    scaled = scaled < 127.0f ? scaled : 127.0f;
    nan |= x != x;
    to[i] = static_cast<uint8_t>(std::bit_cast<int32_t>(scaled + kMagic) + offset);
  }
  return nan != 0;
}

// Rows of a tensor as codes. `floats` is memory for one row.
struct RowReader {
  const Strided& tensor;
  int64_t dtype, size, batch, head;
  float inverse, low;
  int32_t zero;
  float* floats;

  // Fetches a row into the second-level cache: rows of a head often lie far apart, and no prefetcher of the processor's
  // follows them.
  void fetch(int64_t row) const {
    const int64_t element = dtype == kCodes ? 1 : size_of(dtype);
    if (tensor.stride[3] != 1) return;
    prefetch(reinterpret_cast<const float*>(at(tensor, element, batch, head, row)), (size * element + 3) / 4);
  }

  // Writes the row's codes; true if there is a NaN among its numbers.
  bool operator()(int64_t row, uint8_t* codes) const {
    if (dtype == kCodes) {
      const auto* from = reinterpret_cast<const uint8_t*>(at(tensor, 1, batch, head, row));
      const int64_t step = tensor.stride[3];
      if (step == 1) {
        std::memcpy(codes, from, static_cast<size_t>(size));
      } else {
        for (int64_t i = 0; i < size; i++) codes[i] = from[i * step];
      }
      return false;
    }
    const char* from = at(tensor, size_of(dtype), batch, head, row);
    const float* numbers = reinterpret_cast<const float*>(from);
    if (dtype != kFloat32 || tensor.stride[3] != 1) {
      read_row(from, tensor.stride[3], dtype, size, size, floats);
      numbers = floats;
    }
    return quantise(numbers, size, inverse, low, zero, codes);
  }
};

inline RowReader query_reader(const IntegerProblem& p, int64_t batch, int64_t head, float* floats) {
  const float inverse = p.query_key_inverse ? p.query_key_inverse[head] : 0.0f;
  return {p.query, p.dtype, p.head_dim, batch, head, inverse, -128.0f, 128, floats};
}

inline RowReader key_reader(const IntegerProblem& p, int64_t batch, int64_t key_head, float* floats) {
  const float inverse = p.query_key_inverse ? p.query_key_inverse[key_head * (p.heads / p.key_heads)] : 0.0f;
  return {p.key, p.dtype, p.head_dim, batch, key_head, inverse, -128.0f, 128, floats};
}

inline RowReader value_reader(const IntegerProblem& p, int64_t batch, int64_t key_head, float* floats) {
  const float inverse = p.value_inverse ? p.value_inverse[key_head * (p.heads / p.key_heads)] : 0.0f;
  return {p.value, p.dtype, p.value_dim, batch, key_head, inverse, -127.0f, 0, floats};
}

constexpr int64_t kFetched = 32;  // rows between the one worked on and the one fetched

// A row's codes to where key `j` lies.
inline void place_key(const uint8_t* codes, int64_t j, int64_t groups, uint8_t* panels) {
  const int64_t k = j % kPanelKeys;
  uint8_t* target = panels + j / kPanelKeys * groups * kPanelKeys * 8 + k % 4 * kAtom + k / 4 * 8;
  for (int64_t g = 0; g < groups; g++) std::memcpy(target + g * kPanelKeys * 8, codes + g * 8, 8);
}

// Where the quad of key `j` in the first slice lies.
inline int8_t* quad_of(int64_t j, int64_t slices, int8_t* panels) {
  return panels + j / kPanelKeys * slices * kPanelKeys * 16 + j % kPanelKeys / 4 * kAtom;
}

inline void place_value(const uint8_t* codes, int64_t j, int64_t slices, int8_t* panels) {
  int8_t* target = quad_of(j, slices, panels) + j % 4;
  for (int64_t s = 0; s < slices; s++) {
    for (int64_t f = 0; f < 16; f++) target[s * kPanelKeys * 16 + f * 4] = static_cast<int8_t>(codes[s * 16 + f]);
  }
}

// Four rows of codes, 16 · slices each, to where the keys `j` to j + 3 lie.
inline void place_quad(const uint8_t* __restrict codes, int64_t j, int64_t slices, int8_t* __restrict panels) {
  int8_t* quad = quad_of(j, slices, panels);
  for (int64_t s = 0; s < slices; s++) {
    const uint8_t* row = codes + s * 16;
    auto* __restrict target = reinterpret_cast<uint8_t*>(quad + s * kPanelKeys * 16);
    for (int64_t f = 0; f < 16; f++) {
      target[f * 4] = row[f];
      target[f * 4 + 1] = row[slices * 16 + f];
      target[f * 4 + 2] = row[slices * 32 + f];
      target[f * 4 + 3] = row[slices * 48 + f];
    }
  }
}

// The selected keys and values, packed behind the `length` that are there. `codes` is memory for four rows.
inline Fault pack(const RowReader& key, const RowReader& value, const Selection& selection, int64_t length,
                  uint8_t* keys, int8_t* values, uint8_t* codes) {
  const int64_t groups = (key.size + 7) / 8, slices = (value.size + 15) / 16;
  std::memset(codes, 0, static_cast<size_t>(most(groups * 8, slices * 64)));  // what pads a row stays 0
  bool nan = false;
  for (int64_t j = 0; j < least(kFetched, selection.count); j++) {
    key.fetch(selection[j]);
    value.fetch(selection[j]);
  }
  for (int64_t j = 0; j < selection.count; j++) {
    if (j + kFetched < selection.count) key.fetch(selection[j + kFetched]);
    nan |= key(selection[j], codes);
    place_key(codes, length + j, groups, keys);
  }
  if (nan) return kNanInKey;
  std::memset(codes, 0, static_cast<size_t>(most(groups * 8, slices * 64)));
  for (int64_t j = 0; j < selection.count;) {
    const int64_t together = (length + j) % 4 == 0 && j + 4 <= selection.count ? 4 : 1;
    for (int64_t t = 0; t < together; t++) {
      if (j + t + kFetched < selection.count) value.fetch(selection[j + t + kFetched]);
      nan |= value(selection[j + t], codes + t * slices * 16);
    }
    if (together == 4) {
      place_quad(codes, length + j, slices, values);
    } else {
      place_value(codes, length + j, slices, values);
    }
    j += together;
  }
  return nan ? kNanInValue : kNone;
}

}  // namespace
