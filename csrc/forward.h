// The forward pass of some rows of one head.
//
// H = Σ V − Σ clamp(V, −Z, Z) for the signed form, Σ (V − min(V, Z)) for the unsigned one. Σ V is added up once for all
// rows; a key with Z = 0 has nothing to subtract and costs nothing. Where a row sees some keys and not others before
// them, the visible V − clamp(V, −Z, Z) are added up.
//
// Every row's sums run over the same keys in the same order whatever rows are worked on beside it.
#pragma once

#include "kernels.h"
#include "scores.h"

namespace {

// Σ (reach − Z)⁺ over the visible keys of a row.
inline float heard_by(const float* z, const RowView& view, float reach) {
  const auto depth = Simd::set(reach);
  auto sum = Simd::zero();
  for (int64_t j = 0; j < view.limit; j += Simd::width) {
    const auto left = Simd::max(Simd::zero(), Simd::sub(depth, Simd::load(z + j)));  // the second, if NaN
    sum = Simd::add(sum, Simd::where(Simd::bits(view(j, Simd::width)), left));
  }
  return Simd::sum(sum);
}

// A row of a head whose scores, result or inputs are not finite, computed as the equations read.
inline void careful_row(const Problem& p, int64_t batch, int64_t head, int64_t row, const Selection& selection,
                        const RowView& view, float slope, float delta, float* row_memory, float* z, float* output) {
  const int64_t key_head = head / (p.heads / p.key_heads);
  const int64_t size = size_of(p.dtype);
  float *query = row_memory, *key = row_memory + p.head_dim, *value = row_memory;
  read_row(at(p.query, size, batch, head, row), p.query.stride[3], p.dtype, p.head_dim, p.head_dim, query);
  double total = 0.0;
  int64_t count = 0;
  for (int64_t j = 0; j < view.limit; j++) {
    if (!view(j, 1)) continue;
    read_row(at(p.key, size, batch, key_head, selection[j]), p.key.stride[3], p.dtype, p.head_dim, p.head_dim, key);
    float distance = 0.0f;
    for (int64_t f = 0; f < p.head_dim; f++) {
      const float difference = query[f] - key[f];
      distance += difference < 0.0f ? -difference : difference;
    }
    z[j] = slope * distance;
    total += z[j];
    count++;
  }
  const float mean = p.center && count ? static_cast<float>(total / static_cast<double>(count)) : 0.0f;
  for (int64_t f = 0; f < p.value_dim; f++) output[f] = 0.0f;
  float heard = 0.0f;
  for (int64_t j = 0; j < view.limit; j++) {
    if (!view(j, 1)) continue;
    const float shifted = p.center ? z[j] - mean + delta : z[j] + delta;
    const float inhibition = shifted < 0.0f ? 0.0f : shifted;  // NaN stays
    if (p.reach && !(inhibition >= p.reach[head])) heard += p.reach[head] - inhibition;
    read_row(at(p.value, size, batch, key_head, selection[j]), p.value.stride[3], p.dtype, p.value_dim, p.value_dim,
             value);
    for (int64_t f = 0; f < p.value_dim; f++) {
      const float magnitude = p.is_signed && value[f] < 0.0f ? -value[f] : value[f];
      float passed = magnitude - inhibition;
      if (passed < 0.0f) passed = 0.0f;
      output[f] += p.is_signed && value[f] < 0.0f ? -passed : passed;
    }
  }
  if (p.reach) output[p.value_dim] = heard;
}

// Values in slices of a few vectors of features, each (keys, features of the slice); and their sums from the first key
// of a block to the last of every kStep keys.
struct ValueSlices {
  static constexpr int64_t kWidest = Simd::value_vectors * Simd::width;
  static constexpr int64_t kStep = 16;
  float* rows;
  float* sums;
  int64_t step;  // floats of all slices of a row

  static ValueSlices take(Arena& arena, int64_t keys, int64_t value_dim) {
    const int64_t step = round_up(value_dim, Simd::width);
    return {arena.take<float>(keys * step), arena.take<float>((keys + kStep - 1) / kStep * step), step};
  }

  // Features of the slice that begins with `feature`.
  int64_t width(int64_t feature) const {
    int64_t width = kWidest;
    while (feature + width > step) width /= 2;
    return width;
  }
};

inline void pack_values(const Problem& p, int64_t batch, int64_t key_head, const Selection& selection,
                        ValueSlices& values) {
  const int64_t size = size_of(p.dtype);
  int64_t width = 0;
  for (int64_t feature = 0; feature < values.step; feature += width) {
    width = values.width(feature);
    const int64_t features = most(0, least(width, p.value_dim - feature));
    Simd::Vector sum[Simd::value_vectors];
    for (int64_t j = 0; j < selection.count; j++) {
      float* row = values.rows + feature * selection.count + j * width;
      const char* source = at(p.value, size, batch, key_head, selection[j]) + feature * p.value.stride[3] * size;
      read_row(source, p.value.stride[3], p.dtype, features, width, row);
      for (int64_t v = 0; v < width / Simd::width; v++) {
        const auto x = Simd::load(row + v * Simd::width);
        sum[v] = j % kBlock == 0 ? x : Simd::add(sum[v], x);
        float* sums = values.sums + j / ValueSlices::kStep * values.step + feature;
        Simd::store(sums + v * Simd::width, sum[v]);  // the last of kStep stays
      }
    }
  }
}

// Keys of a block, counted from its first.
struct KeyList {
  alignas(64) uint32_t key[kBlock + 16];
  int64_t count;
};

// output += Σ V of the first `count` keys − Σ clamp(V, −Z, Z) over a list; `sums` as in ValueSlices.
template <int Vectors>
inline void add_list(const float* values, const float* sums, int64_t sum_step, int64_t count, const float* z,
                     const KeyList& list, float* output) {
  Simd::Vector sum[Vectors];
  for (auto& vector : sum) vector = Simd::zero();
  for (int64_t t = 0; t < list.count; t++) {
    const float* value = values + list.key[t] * (Vectors * Simd::width);
    const auto inhibition = Simd::set(z[list.key[t]]);
    for (int v = 0; v < Vectors; v++) {
      sum[v] = Simd::add(sum[v], Simd::clamp(Simd::load(value + v * Simd::width), inhibition));
    }
  }
  const int64_t full = count / ValueSlices::kStep;
  for (int v = 0; v < Vectors; v++) {
    auto total = full ? Simd::load(sums + (full - 1) * sum_step + v * Simd::width) : Simd::zero();
    for (int64_t j = full * ValueSlices::kStep; j < count; j++) {
      total = Simd::add(total, Simd::load(values + (j * Vectors + v) * Simd::width));
    }
    const auto rest = Simd::sub(total, sum[v]);
    Simd::store(output + v * Simd::width, Simd::add(Simd::load(output + v * Simd::width), rest));
  }
}

// The same over all keys of a block, where most have Z > 0: the rows share the loads.
template <int Vectors, int Rows>
inline void add_block(const float* values, int64_t keys, const float* z, int64_t z_step, const float* total,
                      float* output, int64_t output_step) {
  Simd::Vector sum[Rows][Vectors];
  for (auto& row : sum) {
    for (auto& vector : row) vector = Simd::zero();
  }
  for (int64_t j = 0; j < keys; j++) {
    Simd::Vector value[Vectors];
    for (int v = 0; v < Vectors; v++) value[v] = Simd::load(values + (j * Vectors + v) * Simd::width);
    for (int r = 0; r < Rows; r++) {
      const auto inhibition = Simd::set(z[r * z_step + j]);
      for (int v = 0; v < Vectors; v++) sum[r][v] = Simd::add(sum[r][v], Simd::clamp(value[v], inhibition));
    }
  }
  for (int r = 0; r < Rows; r++) {
    float* row = output + r * output_step;
    for (int v = 0; v < Vectors; v++) {
      const auto rest = Simd::sub(Simd::load(total + v * Simd::width), sum[r][v]);
      Simd::store(row + v * Simd::width, Simd::add(Simd::load(row + v * Simd::width), rest));
    }
  }
}

// output += what is left of V over a list: where a row does not see all keys between, and in the unsigned form, where no
// key costs nothing and most of Σ V − Σ min(V, Z) would be the difference of two large sums.
template <bool Signed, int Vectors>
inline void add_some(const float* values, const float* z, const KeyList& list, float* output) {
  Simd::Vector sum[Vectors];
  for (auto& vector : sum) vector = Simd::zero();
  for (int64_t t = 0; t < list.count; t++) {
    const float* value = values + list.key[t] * (Vectors * Simd::width);
    const auto inhibition = Simd::set(z[list.key[t]]);
    for (int v = 0; v < Vectors; v++) {
      const auto x = Simd::load(value + v * Simd::width);
      sum[v] = Simd::add(sum[v], Simd::sub(x, Signed ? Simd::clamp(x, inhibition) : Simd::min(x, inhibition)));
    }
  }
  for (int v = 0; v < Vectors; v++) {
    Simd::store(output + v * Simd::width, Simd::add(Simd::load(output + v * Simd::width), sum[v]));
  }
}

// The bits of the keys j to j + width - 1 in a row of bits.
inline uint32_t bits_at(const uint64_t* words, int64_t j) {
  return static_cast<uint32_t>(words[j >> 6] >> (j & 63)) & static_cast<uint32_t>((uint64_t{1} << Simd::width) - 1);
}

// Scores to Z in place; `positive` has a bit for every Z > 0 up to the row's limit.
inline void inhibit(float* scores, const RowView& view, float slope, float mean, float delta, uint64_t* positive) {
  const auto factor = Simd::set(slope), middle = Simd::set(mean), shift = Simd::set(delta);
  for (int64_t first = 0; first < view.limit; first += 64) {
    uint64_t word = 0;
    for (int64_t j = first; j < least(first + 64, view.limit); j += Simd::width) {
      const auto z = inhibition_of(Simd::load(scores + j), middle, factor, shift);
      Simd::store(scores + j, z);
      word |= static_cast<uint64_t>(Simd::bits(Simd::greater(z, Simd::zero()))) << (j - first);
    }
    if (view.limit < first + 64) word &= (uint64_t{1} << (view.limit - first)) - 1;
    positive[first / 64] = word;
  }
}

// The keys from `first` to `end` whose bit is set.
template <class Bits>
inline void list_keys(const Bits& bits, int64_t first, int64_t end, KeyList& list) {
  list.count = 0;
  for (int64_t j = first; j < end; j += Simd::width) {
    const uint32_t chosen = bits(j);
    Simd::compress(list.key + list.count, chosen, static_cast<uint32_t>(j - first));
    list.count += std::popcount(chosen);
  }
}

// The memory of one thread.
struct ForwardMemory {
  Selection* selection;
  int64_t* index;
  uint8_t *any, *all;
  KeyPanels keys;
  ValueSlices values;
  float *query, *half_query, *scores, *output, *row;
  uint64_t* bits;
  uint64_t* positive;
  KeyList* list;
  int64_t score_step, bit_step;

  ForwardMemory(const Problem& p, Arena& arena) {
    score_step = round_up(p.keys, kPanel) + Simd::width;  // not a power of two: rows in different cache sets
    bit_step = (p.keys + kBlock - 1) / kBlock * (kBlock / 64);
    selection = arena.take<Selection>(1);
    index = arena.take<int64_t>(p.keys + 1);
    any = arena.take<uint8_t>(p.keys);
    all = arena.take<uint8_t>(p.keys);
    keys = KeyPanels::take(arena, p.keys, p.head_dim);
    values = ValueSlices::take(arena, p.keys, p.value_dim);
    query = arena.take<float>(kRows * p.head_dim);
    half_query = arena.take<float>(kRows);
    scores = arena.take<float>(kRows * score_step);
    output = arena.take<float>(kRows * values.step);
    row = arena.take<float>(most(kPanel * p.head_dim, p.value_dim));  // a panel, or two rows
    bits = arena.take<uint64_t>(kRows * bit_step);
    positive = arena.take<uint64_t>(kRows * bit_step);
    list = arena.take<KeyList>(1);
  }
};

template <bool Signed, int Vectors>
inline void add_values(const ForwardMemory& m, const RowView* views, int64_t rows, int64_t feature) {
  constexpr int64_t step = Vectors * Simd::width;
  constexpr int Rows = Simd::value_rows;
  const int64_t keys = last_visible(views, rows);
  for (int64_t first = 0; first < keys; first += kBlock) {
    const int64_t end = least(first + kBlock, m.selection->count);
    const float* values = m.values.rows + feature * m.selection->count + first * step;
    const float* sums = m.values.sums + first / ValueSlices::kStep * m.values.step + feature;
    for (int64_t r = 0; r < rows; r++) {
      const float* z = m.scores + r * m.score_step + first;
      const uint64_t* positive = m.positive + r * m.bit_step;
      float* output = m.output + r * m.values.step + feature;
      int64_t together = 0, inhibits = 0;
      while (together < Rows && r + together < rows && !views[r + together].bits && views[r + together].limit >= end) {
        const uint64_t* words = positive + together * m.bit_step + first / 64;
        inhibits += std::popcount(words[0]) + (end - first > 64 ? std::popcount(words[1]) : 0);
        together++;
      }
      const int64_t visible = least(end, views[r].limit);
      if (Signed && together == Rows && inhibits > Simd::dense * static_cast<float>(Rows * (end - first))) {
        const float* total = sums + (end - first - 1) / ValueSlices::kStep * m.values.step;
        add_block<Vectors, Rows>(values, end - first, z, m.score_step, total, output, m.values.step);
        r += Rows - 1;
      } else if (first < visible && Signed && !views[r].bits) {
        list_keys([&](int64_t j) { return bits_at(positive, j); }, first, visible, *m.list);
        add_list<Vectors>(values, sums, m.values.step, visible - first, z, *m.list, output);
      } else if (first < visible) {
        list_keys([&](int64_t j) { return views[r](j, Simd::width); }, first, visible, *m.list);
        add_some<Signed, Vectors>(values, z, *m.list, output);
      }
    }
  }
}

// The slice that begins with `feature`, of `Vectors` vectors or, where it is narrower, half as many.
template <bool Signed, int Vectors>
inline void add_slice(const ForwardMemory& m, const RowView* views, int64_t rows, int64_t feature) {
  if constexpr (Vectors > 1) {
    if (m.values.width(feature) < Vectors * Simd::width) {
      add_slice<Signed, Vectors / 2>(m, views, rows, feature);
      return;
    }
  }
  add_values<Signed, Vectors>(m, views, rows, feature);
}

template <bool Signed>
inline void add_all_values(const ForwardMemory& m, const RowView* views, int64_t rows) {
  for (int64_t feature = 0; feature < m.values.step; feature += m.values.width(feature)) {
    add_slice<Signed, Simd::value_vectors>(m, views, rows, feature);
  }
}

inline void forward_part(const Problem& p, const Part& part, void* memory, int64_t* packed) {
  Arena arena{static_cast<char*>(memory)};
  ForwardMemory m(p, arena);
  const int64_t key_head = part.head / (p.heads / p.key_heads);
  Selection& selection = *m.selection;
  const int64_t name = part.batch * p.heads + part.head;
  if (*packed != name) {
    if (p.dtype == kFloat32 && p.key.stride[3] == 1 && p.value.stride[3] == 1) {
      for (int64_t j = 0; j < p.keys; j++) {
        prefetch(reinterpret_cast<const float*>(at(p.key, 4, part.batch, key_head, j)), p.head_dim);
        prefetch(reinterpret_cast<const float*>(at(p.value, 4, part.batch, key_head, j)), p.value_dim);
      }
      for (int64_t i = part.begin; p.query.stride[3] == 1 && i < least(part.begin + kRows, part.end); i++) {
        prefetch(reinterpret_cast<const float*>(at(p.query, 4, part.batch, part.head, i)), p.head_dim);
      }
    }
    selection = select_keys(p, part.batch, part.head, m.index, m.any, m.all);
    pack_keys(p, part.batch, key_head, selection, m.keys, m.row);
    pack_values(p, part.batch, key_head, selection, m.values);
    *packed = name;
  }
  const float slope = p.gamma[part.head] * static_cast<float>(p.scale), delta = p.delta[part.head];

  for (int64_t first = part.begin; first < part.end; first += kRows) {
    const int64_t rows = least(kRows, part.end - first);
    RowView views[kRows];
    for (int64_t r = 0; r < rows; r++) {
      views[r] = view_row(p, selection, part.batch, part.head, first + r, m.bits + r * m.bit_step);
    }
    pack_queries(p, part.batch, part.head, first, rows, m.keys.middle, m.query, m.half_query);
    score_rows(m.query, m.half_query, views, rows, p.head_dim, m.keys, m.scores, m.score_step);

    bool careful[kRows];
    float heard[kRows];
    for (int64_t r = 0; r < rows; r++) {
      float* scores = m.scores + r * m.score_step;
      const double sum = sum_scores(scores, views[r]);
      const int64_t count = count_visible(views[r]);
      const float mean = p.center && count ? static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
      careful[r] = !is_finite(static_cast<float>(sum)) || !is_finite(slope) || !is_finite(delta);
      inhibit(scores, views[r], 2.0f * slope, mean, delta, m.positive + r * m.bit_step);
      if (p.reach) heard[r] = heard_by(scores, views[r], p.reach[part.head]);
      prefetch_target(at(p.output, 4, part.batch, part.head, first + r), p.value_dim);
      for (int64_t i = 0; i < m.values.step; i += Simd::width) Simd::store(m.output + r * m.values.step + i, Simd::zero());
    }
    if (p.is_signed) {
      add_all_values<true>(m, views, rows);
    } else {
      add_all_values<false>(m, views, rows);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* output = m.output + r * m.values.step;
      float* target = reinterpret_cast<float*>(at(p.output, 4, part.batch, part.head, first + r));
      auto zero = Simd::zero();  // x − x is 0 for what is finite
      for (int64_t f = 0; f < m.values.step; f += Simd::width) {
        const auto x = Simd::load(output + f);
        zero = Simd::add(zero, Simd::sub(x, x));
      }
      if (careful[r] || !is_finite(Simd::sum(zero))) {
        careful_row(p, part.batch, part.head, first + r, selection, views[r], slope, delta, m.row,
                    m.scores + r * m.score_step, target);
        for (int64_t i = 0; i < p.value_dim && !careful[r]; i++) {  // a value is not finite: its features alone
          if (is_finite(output[i])) target[i] = output[i];
        }
      } else {
        copy(output, p.value_dim, target);
      }
      if (p.reach && !careful[r]) target[p.value_dim] = heard[r];
    }
  }
}

}  // namespace
