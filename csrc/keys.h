// The keys of one head that some query may see, packed; and which of them each query may see.
#pragma once

#include <bit>

#include "rows.h"

namespace {

constexpr int64_t kBlock = 128;  // keys of a value block: two levels of summation, a first-level cache of values
constexpr int64_t kRows = 64;    // query rows worked on at once

// Which keys exist for a head: a list in ascending order, and whether the mask still differs between rows.
struct Selection {
  int64_t count = 0;
  const int64_t* index = nullptr;  // null: key j is the j-th
  bool by_row = false;

  int64_t operator[](int64_t j) const { return index ? index[j] : j; }
};

inline const uint8_t* mask_row(const Problem& p, int64_t batch, int64_t head, int64_t row) {
  return reinterpret_cast<const uint8_t*>(at(p.mask, 1, batch, head, row));
}

// Writes the list into `index`, which holds p.keys numbers; `any` and `all` are p.keys bytes of working memory.
inline Selection select_keys(const Problem& p, int64_t batch, int64_t head, int64_t* index, uint8_t* any,
                             uint8_t* all) {
  Selection selection;
  const int64_t keys = p.is_causal ? least(p.keys, p.queries) : p.keys;
  selection.count = keys;
  if (!p.mask.data) return selection;

  const int64_t step = p.mask.stride[3];
  const int64_t rows = p.mask.stride[2] == 0 ? least(p.queries, 1) : p.queries;
  std::memset(any, 0, static_cast<size_t>(keys));
  std::memset(all, 1, static_cast<size_t>(keys));
  for (int64_t i = 0; i < rows; i++) {
    const uint8_t* visible = mask_row(p, batch, head, i);
    const int64_t limit = p.is_causal && rows > 1 ? least(keys, i + 1) : keys;  // no mask shows what that rule hides
    if (step == 1) {
      for (int64_t j = 0; j < limit; j++) any[j] |= visible[j];
      for (int64_t j = 0; j < limit; j++) all[j] &= visible[j];
    } else {
      for (int64_t j = 0; j < limit; j++) {
        any[j] |= visible[j * step];
        all[j] &= visible[j * step];
      }
    }
  }
  selection.count = 0;
  for (int64_t j = 0; j < keys; j++) {
    index[selection.count] = j;
    selection.count += any[j] != 0;
    selection.by_row |= any[j] != all[j];
  }
  if (selection.count < keys) selection.index = index;
  return selection;
}

// A bit for each of eight bytes, set where it is not zero; the first byte has the lowest bit.
inline uint64_t nonzero_bytes(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  constexpr uint64_t low = 0x7F7F7F7F7F7F7F7F;
  word = ((((word & low) + low) | word) >> 7) & 0x0101010101010101;
  return word * 0x0102040810204080 >> 56;
}

// What one row may see of a selection: its first `limit` keys, of those the ones whose bit is set.
struct RowView {
  int64_t limit;
  const uint64_t* bits;  // null: all

  // The bits of the keys j to j + width - 1; width divides 64, and j is a multiple of it.
  uint32_t operator()(int64_t j, int width) const {
    const int64_t left = limit - j;
    if (left <= 0) return 0;
    uint32_t visible = left >= width ? static_cast<uint32_t>((uint64_t{1} << width) - 1)
                                     : static_cast<uint32_t>((uint64_t{1} << left) - 1);
    if (bits) visible &= static_cast<uint32_t>(bits[j >> 6] >> (j & 63));
    return visible;
  }
};

// `bits` is memory for round_up(selection.count, 64) / 64 words.
inline RowView view_row(const Problem& p, const Selection& selection, int64_t batch, int64_t head, int64_t row,
                        uint64_t* bits) {
  RowView view{selection.count, nullptr};
  if (p.is_causal) {  // the keys up to `row`: a search in the ascending list
    int64_t low = 0, high = selection.count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (selection[middle] <= row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    view.limit = low;
  }
  if (!selection.by_row) return view;
  const uint8_t* visible = mask_row(p, batch, head, row);
  const int64_t step = p.mask.stride[3];
  int64_t count = 0, last = 0;  // visible keys; one past the last of them
  for (int64_t j = 0; j < view.limit; j += 64) {
    const int64_t size = least(64, view.limit - j);
    uint64_t word = 0;
    if (size == 64 && step == 1 && !selection.index && std::endian::native == std::endian::little) {
      for (int t = 0; t < 8; t++) word |= nonzero_bytes(visible + j + 8 * t) << (8 * t);
    } else {
      for (int64_t t = 0; t < size; t++) word |= uint64_t{visible[selection[j + t] * step] != 0} << t;
    }
    bits[j >> 6] = word;
    count += std::popcount(word);
    if (word) last = j + 64 - std::countl_zero(word);
  }
  view.limit = last;
  if (count < last) view.bits = bits;
  return view;
}

// One past the last key that any of some rows sees.
inline int64_t last_visible(const RowView* views, int64_t rows) {
  int64_t last = 0;
  for (int64_t r = 0; r < rows; r++) last = most(last, views[r].limit);
  return last;
}

inline int64_t count_visible(const RowView& view) {
  if (!view.bits) return view.limit;
  int64_t count = 0;
  for (int64_t j = 0; j < view.limit; j += 32) {
    count += std::popcount(view(j, 32));
  }
  return count;
}

}  // namespace
