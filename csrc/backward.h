// The backward pass of some rows of one head: scores are computed again, a few rows at a time.
//
//   ∂V_jl = Σ_i g_il [|V_jl| > Z_ij]                         unsigned: V for |V|, 1 for sign(V)
//   ∂Z_ij = −Σ_l g_il sign(V_jl) [|V_jl| > Z_ij]
//   ∂S_ij = ∂Z_ij [Z_ij > 0], minus its mean over the row's visible keys if centred
//   ∂Q_ik = γ·scale Σ_j ∂S_ij sign(Q_ik − K_jk),  ∂K_jk = −γ·scale Σ_i ∂S_ij sign(Q_ik − K_jk)
#pragma once

#include <limits>

#include "kernels.h"
#include "scores.h"

namespace {

constexpr int64_t kGradRows = 48;       // query rows worked on at once
constexpr int64_t kLane = Simd::width;  // keys of a value panel
constexpr int64_t kKeyBlock = 64;       // keys whose slice of features stays in the first-level cache

struct BackwardMemory {
  int64_t* index;
  uint8_t *any, *all;
  KeyPanels keys;
  float *value_panels, *grad_value_panels;  // (panels, value_dim, kLane)
  float *key_rows, *grad_key_rows;          // (keys, head_dim padded)
  float *query, *half_query;                // (rows, head_dim)
  float *query_rows, *grad_query_rows;      // (rows, head_dim padded)
  float* grad;                              // (rows, value_dim)
  float *scores, *inhibition, *grad_scores; // (rows, keys)
  float* row;
  uint64_t* bits;
  int64_t score_step, bit_step, head_step;

  BackwardMemory(const Problem& p, Arena& arena) {
    const int64_t padded = round_up(p.keys, kPanel);
    score_step = padded + Simd::width;  // not a power of two: rows in different cache sets
    bit_step = (p.keys + 63) / 64;
    head_step = round_up(p.head_dim, Simd::width);
    index = arena.take<int64_t>(p.keys + 1);
    any = arena.take<uint8_t>(p.keys);
    all = arena.take<uint8_t>(p.keys);
    keys = KeyPanels::take(arena, p.keys, p.head_dim);
    value_panels = arena.take<float>(padded * p.value_dim);
    grad_value_panels = arena.take<float>(padded * p.value_dim);
    key_rows = arena.take<float>(p.keys * head_step);
    grad_key_rows = arena.take<float>(p.keys * head_step);
    query = arena.take<float>(kGradRows * p.head_dim);
    half_query = arena.take<float>(kGradRows);
    query_rows = arena.take<float>(kGradRows * head_step);
    grad_query_rows = arena.take<float>(kGradRows * head_step);
    grad = arena.take<float>(kGradRows * p.value_dim);
    scores = arena.take<float>(kGradRows * score_step);
    inhibition = arena.take<float>(kGradRows * score_step);
    grad_scores = arena.take<float>(kGradRows * score_step);
    row = arena.take<float>(most(kPanel * p.head_dim, kLane * p.value_dim));
    bits = arena.take<uint64_t>(kGradRows * bit_step);
  }
};

// One vector of keys against `Rows` rows: their ∂Z, written, and their share of the panel's ∂V, added.
template <bool Signed, int Rows>
inline void value_tile(const float* panel, float* grad_panel, int64_t value_dim, const float* grad, const float* z,
                       float* grad_z, int64_t step) {
  Simd::Vector inhibition[Rows], sum[Rows];
  for (int r = 0; r < Rows; r++) {
    inhibition[r] = Simd::load(z + r * step);
    sum[r] = Simd::zero();
  }
  for (int64_t f = 0; f < value_dim; f++) {
    const auto value = Simd::load(panel + f * kLane);
    const auto magnitude = Signed ? Simd::abs(value) : value;
    const auto sign = Signed ? Simd::signed_one(value) : Simd::set(1.0f);
    auto grad_value = Simd::load(grad_panel + f * kLane);
    for (int r = 0; r < Rows; r++) {
      const auto g = Simd::set(grad[r * value_dim + f]);
      const auto passes = Simd::greater(magnitude, inhibition[r]);
      grad_value = Simd::add_where(passes, grad_value, g);
      sum[r] = Simd::fma_where(passes, g, sign, sum[r]);
    }
    Simd::store(grad_panel + f * kLane, grad_value);
  }
  for (int r = 0; r < Rows; r++) Simd::store(grad_z + r * step, Simd::sub(Simd::zero(), sum[r]));
}

template <bool Signed>
inline void value_gradients(const BackwardMemory& m, const RowView* views, int64_t rows, int64_t value_dim) {
  const int64_t keys = last_visible(views, rows);
  for (int64_t first = 0; first < keys; first += kLane) {
    const float* panel = m.value_panels + first * value_dim;
    float* grad_panel = m.grad_value_panels + first * value_dim;
    for_groups<Simd::grad_rows, 4, 1>(rows, [&](auto group, int64_t r) {
      if (last_visible(views + r, group()) <= first) return;
      value_tile<Signed, group()>(panel, grad_panel, value_dim, m.grad + r * value_dim,
                                  m.inhibition + r * m.score_step + first, m.grad_scores + r * m.score_step + first,
                                  m.score_step);
    });
  }
}

// Σ ∂S sign(q − k) of a slice of features: added to the rows' sums over these keys and to the keys' over these rows.
template <int Rows, int Vectors>
inline void distance_tile(const float* query, float* grad_query, const float* key, float* grad_key, int64_t step,
                          const float* grad_scores, int64_t score_step, int64_t keys) {
  Simd::Vector sum[Rows][Vectors];
  for (int r = 0; r < Rows; r++) {
    for (int v = 0; v < Vectors; v++) sum[r][v] = Simd::load(grad_query + r * step + v * Simd::width);
  }
  for (int64_t j = 0; j < keys; j++) {
    Simd::Vector keys_j[Vectors], grads_j[Vectors];
    for (int v = 0; v < Vectors; v++) {
      keys_j[v] = Simd::load(key + j * step + v * Simd::width);
      grads_j[v] = Simd::load(grad_key + j * step + v * Simd::width);
    }
    for (int r = 0; r < Rows; r++) {
      const auto g = Simd::set(grad_scores[r * score_step + j]);
      for (int v = 0; v < Vectors; v++) {
        const auto sign = Simd::sign(Simd::sub(Simd::load(query + r * step + v * Simd::width), keys_j[v]));
        sum[r][v] = Simd::fma(sign, g, sum[r][v]);
        grads_j[v] = Simd::fma(sign, g, grads_j[v]);
      }
    }
    for (int v = 0; v < Vectors; v++) Simd::store(grad_key + j * step + v * Simd::width, grads_j[v]);
  }
  for (int r = 0; r < Rows; r++) {
    for (int v = 0; v < Vectors; v++) Simd::store(grad_query + r * step + v * Simd::width, sum[r][v]);
  }
}

template <int Vectors>
inline void distance_slice(const BackwardMemory& m, const RowView* views, int64_t rows, int64_t feature) {
  const int64_t keys = last_visible(views, rows);
  for (int64_t first = 0; first < keys; first += kKeyBlock) {
    const float* key = m.key_rows + first * m.head_step + feature;
    float* grad_key = m.grad_key_rows + first * m.head_step + feature;
    for_groups<Simd::distance_rows, 4, 1>(rows, [&](auto group, int64_t r) {
      const int64_t count = least(kKeyBlock, last_visible(views + r, group()) - first);
      distance_tile<group(), Vectors>(m.query_rows + r * m.head_step + feature,
                                      m.grad_query_rows + r * m.head_step + feature, key, grad_key, m.head_step,
                                      m.grad_scores + r * m.score_step + first, m.score_step, count);
    });
  }
}

inline void distance_gradients(const BackwardMemory& m, const RowView* views, int64_t rows) {
  int64_t feature = 0;
  for (; feature + 2 * Simd::width <= m.head_step; feature += 2 * Simd::width) {
    distance_slice<2>(m, views, rows, feature);
  }
  for (; feature < m.head_step; feature += Simd::width) distance_slice<1>(m, views, rows, feature);
}

// ∂Z of a row less its share in (reach − Z)⁺, whose gradient is g; returns the row's share of ∂reach. Z = ∞ if hidden.
inline double reach_gradients(float reach, float g, const float* z, float* grad, int64_t end) {
  const auto depth = Simd::set(reach), share = Simd::set(-g);
  int64_t heard = 0;
  for (int64_t j = 0; j < end; j += Simd::width) {
    const auto hears = Simd::greater(depth, Simd::load(z + j));
    Simd::store(grad + j, Simd::add_where(hears, Simd::load(grad + j), share));
    heard += std::popcount(Simd::bits(hears));
  }
  return static_cast<double>(heard) * static_cast<double>(g);
}

struct RowSums {
  double gamma, delta;
};

// ∂Z of a row to γ·scale·∂S, 0 where hidden; returns its share of ∂γ / scale and of ∂δ.
inline RowSums score_gradients(const RowView& view, int64_t count, bool center, float slope, const float* scores,
                               const float* z, float* grad, int64_t end) {
  double total = 0.0, product = 0.0;
  for (int64_t first = 0; first < view.limit; first += 1024) {
    auto sum = Simd::zero();
    for (int64_t j = first; j < least(first + 1024, view.limit); j += Simd::width) {
      const auto acts = Simd::both(Simd::bits(view(j, Simd::width)), Simd::greater(Simd::load(z + j), Simd::zero()));
      const auto g = Simd::where(acts, Simd::load(grad + j));
      Simd::store(grad + j, g);
      sum = Simd::add(sum, g);
    }
    total += Simd::sum(sum);
  }
  const auto mean = Simd::set(center && count ? static_cast<float>(total / static_cast<double>(count)) : 0.0f);
  for (int64_t first = 0; first < view.limit; first += 1024) {
    auto sum = Simd::zero();
    for (int64_t j = first; j < least(first + 1024, view.limit); j += Simd::width) {
      const auto visible = Simd::bits(view(j, Simd::width));
      const auto g = Simd::where(visible, Simd::sub(Simd::load(grad + j), mean));
      sum = Simd::fma(g, Simd::where(visible, Simd::load(scores + j)), sum);
      Simd::store(grad + j, Simd::mul(g, Simd::set(slope)));
    }
    product += Simd::sum(sum);
  }
  for (int64_t j = round_up(view.limit, Simd::width); j < end; j++) grad[j] = 0.0f;
  return {2.0 * product, total};
}

inline void backward_part(const Problem& p, const Part& part, KeyGradients& result, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  BackwardMemory m(p, arena);
  const int64_t key_head = part.head / (p.heads / p.key_heads);
  const int64_t size = size_of(p.dtype);
  const Selection selection = select_keys(p, part.batch, part.head, m.index, m.any, m.all);
  const float scale = static_cast<float>(p.scale);
  const float slope = p.gamma[part.head] * scale, delta = p.delta[part.head];

  pack_keys(p, part.batch, key_head, selection, m.keys, m.row);
  pack_panels(p, p.value, part.batch, key_head, selection, p.value_dim, kLane, m.value_panels, m.row);
  const int64_t padded = round_up(selection.count, kLane);
  std::memset(m.grad_value_panels, 0, static_cast<size_t>(padded * p.value_dim) * 4);
  std::memset(m.grad_key_rows, 0, static_cast<size_t>(selection.count * m.head_step) * 4);
  for (int64_t j = 0; j < selection.count; j++) {
    read_row(at(p.key, size, part.batch, key_head, selection[j]), p.key.stride[3], p.dtype, p.head_dim, m.head_step,
             m.key_rows + j * m.head_step);
  }

  for (int64_t first = part.begin; first < part.end; first += kGradRows) {
    const int64_t rows = least(kGradRows, part.end - first);
    RowView views[kGradRows];
    for (int64_t r = 0; r < rows; r++) {
      views[r] = view_row(p, selection, part.batch, part.head, first + r, m.bits + r * m.bit_step);
      read_row(at(p.grad_output, 4, part.batch, part.head, first + r), p.grad_output.stride[3], kFloat32,
               p.value_dim, p.value_dim, m.grad + r * p.value_dim);
    }
    pack_queries(p, part.batch, part.head, first, rows, m.keys.middle, m.query, m.half_query);
    score_rows(m.query, m.half_query, views, rows, p.head_dim, m.keys, m.scores, m.score_step);
    const int64_t end = round_up(last_visible(views, rows), Simd::width);

    int64_t counts[kGradRows];
    for (int64_t r = 0; r < rows; r++) {
      counts[r] = count_visible(views[r]);
      const double sum = sum_scores(m.scores + r * m.score_step, views[r]);
      const float mean = p.center && counts[r] ? static_cast<float>(sum / static_cast<double>(counts[r])) : 0.0f;
      const auto factor = Simd::set(2.0f * slope), middle = Simd::set(mean), shift = Simd::set(delta);
      const auto hidden = Simd::set(std::numeric_limits<float>::infinity());
      for (int64_t j = 0; j < end; j += Simd::width) {
        const auto z = inhibition_of(Simd::load(m.scores + r * m.score_step + j), middle, factor, shift);
        Simd::store(m.inhibition + r * m.score_step + j,
                    Simd::select(Simd::bits(views[r](j, Simd::width)), z, hidden));
      }
    }
    if (p.is_signed) {
      value_gradients<true>(m, views, rows, p.value_dim);
    } else {
      value_gradients<false>(m, views, rows, p.value_dim);
    }
    for (int64_t r = 0; r < rows; r++) {
      if (p.reach) {
        const char* grad = at(p.grad_output, 4, part.batch, part.head, first + r);
        const float of_heard = reinterpret_cast<const float*>(grad)[p.value_dim * p.grad_output.stride[3]];
        result.reach += reach_gradients(p.reach[part.head], of_heard, m.inhibition + r * m.score_step,
                                        m.grad_scores + r * m.score_step, end);
      }
      const RowSums sums = score_gradients(views[r], counts[r], p.center, slope, m.scores + r * m.score_step,
                                           m.inhibition + r * m.score_step, m.grad_scores + r * m.score_step, end);
      result.gamma += sums.gamma * static_cast<double>(scale);
      result.delta += sums.delta;
      read_row(at(p.query, size, part.batch, part.head, first + r), p.query.stride[3], p.dtype, p.head_dim,
               m.head_step, m.query_rows + r * m.head_step);
    }
    std::memset(m.grad_query_rows, 0, static_cast<size_t>(rows * m.head_step) * 4);
    distance_gradients(m, views, rows);
    for (int64_t r = 0; r < rows; r++) {
      write_row(m.grad_query_rows + r * m.head_step, p.dtype, p.head_dim,
                at(p.grad_query, size, part.batch, part.head, first + r));
    }
  }

  // Every key's row is written, those that no query may see with zeros.
  const int64_t result_size = size_of(result.dtype);
  int64_t next = 0;
  for (int64_t j = 0; j < p.keys; j++) {
    const bool selected = next < selection.count && selection[next] == j;
    const int64_t panel = next / kLane * kLane;
    for (int64_t f = 0; f < p.value_dim; f++) {
      m.row[f] = selected ? m.grad_value_panels[panel * p.value_dim + f * kLane + next % kLane] : 0.0f;
    }
    write_row(m.row, result.dtype, p.value_dim, result.value + j * result.value_step * result_size);
    for (int64_t f = 0; f < p.head_dim; f++) {
      m.row[f] = selected ? -m.grad_key_rows[next * m.head_step + f] : 0.0f;
    }
    write_row(m.row, result.dtype, p.head_dim, result.key + j * result.key_step * result_size);
    next += selected;
  }
}

}  // namespace
