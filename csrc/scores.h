// M = ½ Σ|q − k| for tiles of rows and keys, by Σ|q − k| = 2 Σ max(q, k) − Σq − Σk.
//
// The identity loses the digits that the large common part of a feature takes. Where all keys of a feature are far from
// zero on one side, the middle of their range is taken from keys (exactly) and queries first; but only where every query
// sees all of them, because a key out of sight must not change a bit. Under a causal rule alone the first key is taken
// away instead, which every query sees that sees any.
#pragma once

#include "keys.h"

namespace {

constexpr int64_t kPanel = Simd::score_vectors * Simd::width;  // keys of a panel

// Keys less their middle in panels of (head_dim, kPanel), and ½ of each key's sum. Behind the last key lies no key.
struct KeyPanels {
  float* panels;
  float* half_sums;
  float* middle;  // (head_dim)

  static KeyPanels take(Arena& arena, int64_t keys, int64_t head_dim) {
    const int64_t padded = round_up(keys, kPanel);
    return {arena.take<float>(padded * head_dim), arena.take<float>(padded), arena.take<float>(head_dim)};
  }
};

// Rows of `columns` floats, `from_step` apart, into columns `to_step` apart.
inline void transpose(const float* from, int64_t from_step, int64_t rows, int64_t columns, float* to,
                      int64_t to_step) {
  int64_t row = 0;
  for (; row + Simd::transposed <= rows; row += Simd::transposed) {
    int64_t column = 0;
    for (; column + Simd::transposed <= columns; column += Simd::transposed) {
      Simd::transpose(from + row * from_step + column, from_step, to + column * to_step + row, to_step);
    }
    for (; column < columns; column++) {
      for (int64_t i = 0; i < Simd::transposed; i++) {
        to[column * to_step + row + i] = from[(row + i) * from_step + column];
      }
    }
  }
  for (; row < rows; row++) {
    for (int64_t column = 0; column < columns; column++) to[column * to_step + row] = from[row * from_step + column];
  }
}

// The selected rows of a (batch, heads, length, features) tensor, transposed into panels of `panel` keys.
// `rows` is memory for panel × features floats.
inline void pack_panels(const Problem& p, const Strided& tensor, int64_t batch, int64_t head,
                        const Selection& selection, int64_t features, int64_t panel, float* panels, float* rows) {
  const int64_t size = size_of(p.dtype);
  for (int64_t first = 0; first < selection.count; first += panel) {
    const int64_t count = least(panel, selection.count - first);
    float* target = panels + first * features;
    const float* source = rows;
    int64_t step = features;
    if (p.dtype == kFloat32 && tensor.stride[3] == 1 && !selection.index) {
      source = reinterpret_cast<const float*>(at(tensor, size, batch, head, first));
      step = tensor.stride[2];
    } else {
      for (int64_t j = 0; j < count; j++) {
        read_row(at(tensor, size, batch, head, selection[first + j]), tensor.stride[3], p.dtype, features, features,
                 rows + j * features);
      }
    }
    transpose(source, step, count, features, target, panel);
    for (int64_t f = 0; f < features && count < panel; f++) {
      for (int64_t j = count; j < panel; j++) target[f * panel + j] = 0.0f;
    }
  }
}

// What is taken from a feature of all keys of a causal head: the first key's, if it is finite.
inline float first_key(const float* panels) { return is_finite(panels[0]) ? panels[0] : 0.0f; }

// The middle of the range of one feature's keys if they are all far from zero, else 0.
inline float far_middle(const float* panels, int64_t head_dim, int64_t keys) {
  float lowest = panels[0], highest = panels[0];
  for (int64_t first = 0; first < keys; first += kPanel) {
    const float* key = panels + first * head_dim;
    const int64_t count = least(kPanel, keys - first);
    int64_t j = 0;
    if (count >= Simd::width) {
      auto low = Simd::load(key), high = low;
      for (; j + Simd::width <= count; j += Simd::width) {
        low = Simd::min(low, Simd::load(key + j));
        high = Simd::max(high, Simd::load(key + j));
      }
      float lows[Simd::width], highs[Simd::width];
      Simd::store(lows, low);
      Simd::store(highs, high);
      for (int i = 0; i < Simd::width; i++) {
        lowest = lows[i] < lowest ? lows[i] : lowest;
        highest = highs[i] > highest ? highs[i] : highest;
      }
    }
    for (; j < count; j++) {
      lowest = key[j] < lowest ? key[j] : lowest;
      highest = key[j] > highest ? key[j] : highest;
    }
  }
  const float middle = 0.5f * lowest + 0.5f * highest, range = highest - lowest;
  return is_finite(range) && (middle > range || -middle > range) ? middle : 0.0f;
}

inline void pack_keys(const Problem& p, int64_t batch, int64_t key_head, const Selection& selection, KeyPanels& keys,
                      float* rows) {
  pack_panels(p, p.key, batch, key_head, selection, p.head_dim, kPanel, keys.panels, rows);
  const bool by_row = selection.by_row || selection.count == 0;
  for (int64_t f = 0; f < p.head_dim; f++) {
    const float* feature = keys.panels + f * kPanel;
    keys.middle[f] = by_row         ? 0.0f
                     : p.is_causal ? first_key(feature)
                                    : far_middle(feature, p.head_dim, selection.count);
  }
  for (int64_t first = 0; first < selection.count; first += kPanel) {
    float* panel = keys.panels + first * p.head_dim;
    for (int v = 0; v < Simd::score_vectors; v++) {
      auto sum = Simd::zero();
      for (int64_t f = 0; f < p.head_dim; f++) {
        float* key = panel + f * kPanel + v * Simd::width;
        const auto moved = Simd::sub(Simd::load(key), Simd::set(keys.middle[f]));
        Simd::store(key, moved);
        sum = Simd::add(sum, moved);
      }
      Simd::store(keys.half_sums + first + v * Simd::width, Simd::mul(sum, Simd::set(0.5f)));
    }
  }
}

// Adds the features `first` to `end` to the sums of a tile; after the last of them it makes scores of the sums. Fused: by
// multiply-additions with 1, which give the same bits.
template <bool Fused, int Rows, int Vectors>
inline void score_tile(const float* query, int64_t head_dim, int64_t first, int64_t end, const float* half_query,
                       const float* panel, const float* half_key, float* scores, int64_t step) {
  Simd::Vector sum[Rows][Vectors];
  for (int r = 0; r < Rows; r++) {
    for (int v = 0; v < Vectors; v++) {
      sum[r][v] = first == 0 ? Simd::zero() : Simd::load(scores + r * step + v * Simd::width);
    }
  }
  const auto one = Simd::set(1.0f);
  for (int64_t f = first; f < end; f++) {
    Simd::Vector key[Vectors];
    for (int v = 0; v < Vectors; v++) key[v] = Simd::load(panel + f * kPanel + v * Simd::width);
    for (int r = 0; r < Rows; r++) {
      const auto q = Simd::set(query[r * head_dim + f]);
      for (int v = 0; v < Vectors; v++) {
        const auto larger = Simd::max(q, key[v]);
        sum[r][v] = Fused ? Simd::fma(larger, one, sum[r][v]) : Simd::add(sum[r][v], larger);
      }
    }
  }
  for (int r = 0; r < Rows; r++) {
    const auto half = Simd::set(half_query[r]);
    for (int v = 0; v < Vectors; v++) {
      auto score = sum[r][v];
      if (end == head_dim) {
        score = Simd::sub(score, Simd::add(half, Simd::load(half_key + v * Simd::width)));
      }
      Simd::store(scores + r * step + v * Simd::width, score);
    }
  }
}

// The same for as many vectors of a panel as hold `keys` keys.
template <int Rows, int Vectors, class... Arguments>
inline void score_keys(int64_t keys, Arguments... arguments) {
  if constexpr (Vectors > 1) {
    if (keys <= (Vectors - 1) * Simd::width) {
      score_keys<Rows, Vectors - 1>(keys, arguments...);
      return;
    }
  }
  if (Simd::fuses()) {
    score_tile<true, Rows, Vectors>(arguments...);
  } else {
    score_tile<false, Rows, Vectors>(arguments...);
  }
}

// The scores of `rows` queries, packed one behind the other, against the keys that they may see.
inline void score_rows(const float* query, const float* half_query, const RowView* views, int64_t rows,
                       int64_t head_dim, const KeyPanels& packed, float* scores, int64_t step) {
  constexpr int64_t kFeatures = 4096 / kPanel;  // a piece of a panel that stays in the first-level cache
  const int64_t keys = last_visible(views, rows);
  for (int64_t key = 0; key < keys; key += kPanel) {
    const float* panel = packed.panels + key * head_dim;
    for (int64_t first = 0; first < head_dim; first += kFeatures) {
      const int64_t end = least(first + kFeatures, head_dim);
      for_groups<Simd::score_rows, 4, 1>(rows, [&](auto group, int64_t r) {
        const int64_t visible = last_visible(views + r, group()) - key;
        if (visible <= 0) return;
        score_keys<group(), Simd::score_vectors>(visible, query + r * head_dim, head_dim, first, end, half_query + r,
                                                 panel, packed.half_sums + key, scores + r * step + key, step);
      });
    }
  }
}

// `count` rows of the query less the keys' middle one behind the other, and ½ of each one's sum. It is added up in the
// order of the tiles' sums, feature by feature: the score of a query that is its key is then 0. Rows side by side, because
// an addition takes as long as four that do not wait for it.
inline void pack_queries(const Problem& p, int64_t batch, int64_t head, int64_t first, int64_t count,
                         const float* middle, float* query, float* half_query) {
  for (int64_t r = 0; r < count; r++) {
    float* row = query + r * p.head_dim;
    read_row(at(p.query, size_of(p.dtype), batch, head, first + r), p.query.stride[3], p.dtype, p.head_dim,
             p.head_dim, row);
    int64_t f = 0;
    for (; f + Simd::width <= p.head_dim; f += Simd::width) {
      Simd::store(row + f, Simd::sub(Simd::load(row + f), Simd::load(middle + f)));
    }
    for (; f < p.head_dim; f++) row[f] -= middle[f];
  }
  constexpr int64_t kTogether = 8;
  for (int64_t r = 0; r < count; r += kTogether) {
    float sums[kTogether] = {};
    const int64_t rows = least(kTogether, count - r);
    for (int64_t f = 0; f < p.head_dim; f++) {
      for (int64_t i = 0; i < kTogether; i++) sums[i] += query[(r + (i < rows ? i : 0)) * p.head_dim + f];
    }
    for (int64_t i = 0; i < rows; i++) half_query[r + i] = 0.5f * sums[i];
  }
}

// Sum of the visible scores of a row.
inline double sum_scores(const float* scores, const RowView& view) {
  double total = 0.0;
  for (int64_t first = 0; first < view.limit; first += 1024) {
    auto even = Simd::zero(), odd = Simd::zero();
    int64_t j = first;
    const int64_t end = least(first + 1024, view.limit);
    for (; !view.bits && j + 2 * Simd::width <= end; j += 2 * Simd::width) {
      even = Simd::add(even, Simd::load(scores + j));
      odd = Simd::add(odd, Simd::load(scores + j + Simd::width));
    }
    for (; j < end; j += Simd::width) {
      even = Simd::add(even, Simd::where(Simd::bits(view(j, Simd::width)), Simd::load(scores + j)));
    }
    total += Simd::sum(Simd::add(even, odd));
  }
  return total;
}

// Z = ReLU(2γ·scale·(M − mean) + δ). The difference comes first: it is 0 where M is the mean, as in a row of one key.
inline Simd::Vector inhibition_of(Simd::Vector score, Simd::Vector mean, Simd::Vector slope, Simd::Vector delta) {
  return Simd::max(Simd::fma(Simd::sub(score, mean), slope, delta), Simd::zero());
}

}  // namespace
