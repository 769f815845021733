// Few queries against many keys, as in decoding: keys and values are read where they lie, because to pack them would
// cost more than the work itself. Two steps over parts of the keys: scores, then, once the means are known, values.
#pragma once

#include "kernels.h"
#include "keys.h"

namespace {

// One query of the heads that share a key head, numbered head by head.
struct DecodeRow {
  int64_t head, query;
  int64_t limit;        // causal: keys up to here
  const uint8_t* mask;  // null: all visible
  int64_t mask_step;

  DecodeRow(const Problem& p, int64_t batch, int64_t key_head, int64_t row)
      : head(key_head * (p.heads / p.key_heads) + row / p.queries),
        query(row % p.queries),
        limit(p.is_causal ? query + 1 : p.keys),
        mask(p.mask.data ? mask_row(p, batch, head, query) : nullptr),
        mask_step(p.mask.stride[3]) {}

  bool sees(int64_t key) const { return key < limit && (!mask || mask[key * mask_step]); }
};

constexpr int64_t kAhead = 16;  // rows between the one worked on and the one fetched: some hundred cycles

// A row as whole vectors, in place if it lies so, else copied.
inline const float* vectors_of(const Strided& tensor, int64_t dtype, int64_t batch, int64_t head, int64_t row,
                               int64_t size, float* copy) {
  const char* source = at(tensor, size_of(dtype), batch, head, row);
  if (dtype == kFloat32 && tensor.stride[3] == 1 && size % Simd::width == 0) {
    prefetch(reinterpret_cast<const float*>(source) + kAhead * tensor.stride[2], size);
    return reinterpret_cast<const float*>(source);
  }
  read_row(source, tensor.stride[3], dtype, size, round_up(size, Simd::width), copy);
  return copy;
}

// Floats of a row of the result: whole vectors of values, and what is left of a reach.
inline int64_t decode_step(const Problem& p) { return round_up(p.value_dim, Simd::width) + (p.reach ? 1 : 0); }

struct DecodeMemory {
  float *query, *row;

  DecodeMemory(const Problem& p, Arena& arena) {
    query = arena.take<float>(round_up(p.head_dim, Simd::width));
    row = arena.take<float>(round_up(most(p.head_dim, p.value_dim), Simd::width));
  }
};

// Σ|q − k| of the part's keys for every row, 0 where hidden, and in `sums` and `counts` what the mean needs.
inline void decode_scores(const Problem& p, const KeyPart& part, float* scores, double* sums, int64_t* counts,
                          void* memory) {
  Arena arena{static_cast<char*>(memory)};
  DecodeMemory m(p, arena);
  const int64_t step = round_up(p.head_dim, Simd::width);
  for (int64_t r = 0; r < p.heads / p.key_heads * p.queries; r++) {
    const DecodeRow row(p, part.batch, part.key_head, r);
    read_row(at(p.query, size_of(p.dtype), part.batch, row.head, row.query), p.query.stride[3], p.dtype, p.head_dim,
             step, m.query);
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t j = part.begin; j < part.end; j++) {
      float distance = 0.0f;
      if (row.sees(j)) {
        const float* key = vectors_of(p.key, p.dtype, part.batch, part.key_head, j, p.head_dim, m.row);
        auto lanes = Simd::zero();
        for (int64_t f = 0; f < step; f += Simd::width) {
          lanes = Simd::add(lanes, Simd::abs(Simd::sub(Simd::load(m.query + f), Simd::load(key + f))));
        }
        distance = Simd::sum(lanes);
        count++;
      }
      scores[r * p.keys + j] = distance;
      sum += distance;
    }
    sums[r] = sum;
    counts[r] = count;
  }
}

// The part's share of H for every row; `means` are those of Σ|q − k|.
template <bool Signed>
inline void decode_sum(const Problem& p, const KeyPart& part, const float* scores, const float* means, float* output,
                       void* memory) {
  Arena arena{static_cast<char*>(memory)};
  DecodeMemory m(p, arena);
  const int64_t rows = p.heads / p.key_heads * p.queries, step = decode_step(p);
  const int64_t features = round_up(p.value_dim, Simd::width);
  std::memset(output, 0, static_cast<size_t>(rows * step) * 4);
  for (int64_t r = 0; r < rows; r++) {
    const DecodeRow row(p, part.batch, part.key_head, r);
    const float slope = p.gamma[row.head] * static_cast<float>(p.scale), delta = p.delta[row.head];
    float* sum = output + r * step;
    for (int64_t j = part.begin; j < part.end; j++) {
      if (!row.sees(j)) continue;
      const float* value = vectors_of(p.value, p.dtype, part.batch, part.key_head, j, p.value_dim, m.row);
      const float shifted = slope * (scores[r * p.keys + j] - means[r]) + delta;
      const float inhibition = shifted < 0.0f ? 0.0f : shifted;  // NaN stays
      const auto z = Simd::set(inhibition);
      if (p.reach && !(inhibition >= p.reach[row.head])) sum[features] += p.reach[row.head] - inhibition;
      for (int64_t f = 0; f < features; f += Simd::width) {
        const auto x = Simd::load(value + f);
        // |V| − Z, not V − clamp(V, −Z, Z), which is ∞ − ∞ where both are infinite and loses a NaN in Z.
        const auto rest = Simd::max(Simd::zero(), Simd::sub(Signed ? Simd::abs(x) : x, z));  // the second, if NaN
        const auto passed = Signed ? Simd::mul(rest, Simd::signed_one(x)) : rest;
        Simd::store(sum + f, Simd::add(Simd::load(sum + f), passed));
      }
    }
  }
}

inline void decode_values(const Problem& p, const KeyPart& part, const float* scores, const float* means,
                          float* output, void* memory) {
  if (p.is_signed) {
    decode_sum<true>(p, part, scores, means, output, memory);
  } else {
    decode_sum<false>(p, part, scores, means, output, memory);
  }
}

}  // namespace
