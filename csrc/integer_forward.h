// The forward pass of some rows of one head in integers, as docs/integer.md specifies it bit by bit.
//
// Distances of all rows lie as words; z is made of them block by block, 255 for a key out of sight, which removes every
// value and is beyond every reach.
#pragma once

#include <cmath>

#include "integer_pack.h"

// A tile alone in a function of its own has all registers to itself.
#if defined(_MSC_VER)
#define INHIBITOR_APART __declspec(noinline)
#else
#define INHIBITOR_APART __attribute__((noinline))
#endif

namespace {

constexpr int64_t kIntegerRows = 64;  // query rows worked on at once
constexpr int64_t kIntegerBlock = 512;  // keys of a value block: AVX2 adds up so many in 16 bits, and no more
constexpr int64_t kHalves = kAtom / Bytes::width;
constexpr int64_t kSums = Bytes::width / 4;
constexpr int64_t kInhibitionStep = kIntegerBlock + 64;  // not a power of two: rows in different cache sets
constexpr double kUnheard = 0.5;  // keys that a query hears beside those there are

// The memory of one thread.
struct IntegerMemory {
  Selection* selection;
  int64_t* index;
  uint8_t *any, *all;
  uint8_t* keys;   // packed
  int8_t* values;  // packed
  uint8_t* query;  // (rows, groups of 8)
  uint8_t* distances;   // words, (rows, distance_step)
  uint8_t* inhibition;  // (rows, kInhibitionStep)
  int32_t* sums;        // of distances less 2^15, (rows, kSums)
  int32_t* output;      // (rows, slices of 16, and room for what is heard)
  uint8_t *magnitude, *sign;  // (atoms, block)
  uint8_t* codes;
  float* floats;
  uint64_t* bits;
  int64_t distance_step, bit_step, query_step, output_step;

  IntegerMemory(const IntegerProblem& p, Arena& arena) {
    const int64_t panels = (p.keys + kPanelKeys - 1) / kPanelKeys, rows_now = least(kIntegerRows, p.queries);
    distance_step = panels * kPanelKeys * 2 + 64;  // not a power of two: rows in different cache sets
    bit_step = (p.keys + 63) / 64;
    query_step = key_groups(p) * 8;
    output_step = value_slices(p) * 16 + (p.reach ? 16 : 0);
    selection = arena.take<Selection>(1);
    index = arena.take<int64_t>(p.keys + 1);
    any = arena.take<uint8_t>(p.keys);
    all = arena.take<uint8_t>(p.keys);
    keys = arena.take<uint8_t>(p.is_packed ? 0 : panels * key_panel_bytes(p));
    values = arena.take<int8_t>(p.is_packed ? 0 : panels * value_panel_bytes(p));
    query = arena.take<uint8_t>(rows_now * query_step);
    distances = arena.take<uint8_t>(rows_now * distance_step);
    inhibition = arena.take<uint8_t>(rows_now * kInhibitionStep);
    sums = arena.take<int32_t>(rows_now * kSums);
    output = arena.take<int32_t>(rows_now * output_step);
    magnitude = arena.take<uint8_t>(Bytes::value_atoms * kIntegerBlock * 16);
    sign = arena.take<uint8_t>(Bytes::value_atoms * kIntegerBlock * 16);
    codes = arena.take<uint8_t>(most(query_step, output_step * 4));
    floats = arena.take<float>(most(p.head_dim, p.value_dim));
    bits = arena.take<uint64_t>(rows_now * bit_step);
  }
};

// Packed keys and values of a head, and from panel to panel.
struct Packed {
  const uint8_t* keys;
  const int8_t* values;
  int64_t key_step, value_step;
};

// The distances of `Rows` queries from the 32 keys of a panel; added to the rows' sums where `Summed`.
template <int Rows, bool Summed>
INHIBITOR_APART void distance_tile(const uint8_t* query, int64_t query_step, int64_t groups, const uint8_t* panel,
                                   uint8_t* words, int64_t word_step, int32_t* sums) {
  for (int64_t half = 0; half < kHalves; half++) {
    Bytes::Vector sum[Rows][4];
    const auto add_group = [&](int64_t g, auto add) {
      Bytes::Vector key[4];
      for (int a = 0; a < 4; a++) key[a] = Bytes::load(panel + (g * 4 + a) * kAtom + half * Bytes::width);
      for (int r = 0; r < Rows; r++) {
        const auto features = Bytes::repeat8(query + r * query_step + g * 8);
        for (int a = 0; a < 4; a++) sum[r][a] = add(sum[r][a], Bytes::distance(features, key[a]));
      }
    };
    add_group(0, [](auto, auto distance) { return distance; });
    for (int64_t g = 1; g < groups; g++) add_group(g, Bytes::add_words);
    for (int r = 0; r < Rows; r++) {
      const auto joined = Bytes::join(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
      Bytes::store(words + r * word_step + half * Bytes::width, joined);
      if (Summed) Bytes::add_to_sum(sums + r * kSums, joined);
    }
  }
}

inline uint16_t word_at(const uint8_t* words, int64_t j) {
  uint16_t word;
  std::memcpy(&word, words + 2 * j, 2);
  return word;
}

// The distances of all rows, and the sum of those that each row sees.
inline void add_distances(const IntegerMemory& m, const Packed& packed, const RowView* views, int64_t rows,
                          int64_t groups, int64_t* totals) {
  const int64_t keys = last_visible(views, rows);
  std::memset(m.sums, 0, static_cast<size_t>(rows * kSums) * 4);
  for (int64_t r = 0; r < rows; r++) totals[r] = 0;
  for (int64_t first = 0; first < keys; first += kPanelKeys) {
    const uint8_t* panel = packed.keys + first / kPanelKeys * packed.key_step;
    for_groups<Bytes::score_rows, 1>(rows, [&](auto group, int64_t r) {
      if (last_visible(views + r, group()) <= first) return;
      const uint8_t* query = m.query + r * m.query_step;
      uint8_t* words = m.distances + r * m.distance_step + first * 2;
      bool whole = true;
      for (int t = 0; t < group(); t++) whole &= !views[r + t].bits && views[r + t].limit >= first + kPanelKeys;
      if (whole) {
        distance_tile<group(), true>(query, m.query_step, groups, panel, words, m.distance_step, m.sums + r * kSums);
        for (int t = 0; t < group(); t++) totals[r + t] += kPanelKeys << 15;  // what add_to_sum leaves out
        return;
      }
      distance_tile<group(), false>(query, m.query_step, groups, panel, words, m.distance_step, nullptr);
      for (int t = 0; t < group(); t++) {
        const uint32_t visible = views[r + t](first, kPanelKeys);
        uint32_t sum = 0;
        for (uint32_t j = 0; j < kPanelKeys; j++) sum += word_at(words + t * m.distance_step, j) * (visible >> j & 1);
        totals[r + t] += sum;
      }
    });
  }
  for (int64_t r = 0; r < rows; r++) totals[r] += Bytes::total_of(m.sums + r * kSums);
}

// t: the mean of the visible distances, rounded half up, less the threshold.
inline int32_t middle_of(int64_t total, int64_t count, int32_t threshold) {
  const int64_t middle = (count ? (2 * total + count) / (2 * count) : 0) - threshold;
  return static_cast<int32_t>(middle < -65535 ? -65535 : middle > 65535 ? 65535 : middle);
}

// Distances to z: min(max(D − t, 0) · multiplier >> shift, 255). `Steep`: a shift below 16, where what is larger than
// `cap` gives 255 anyhow and would not fit the words on the way.
template <bool Steep, bool Up>
inline void inhibit_words(const uint8_t* words, int64_t keys, int32_t middle, int32_t multiplier, int32_t shift,
                          uint8_t* z) {
  const auto away = Bytes::words(Up ? -middle : middle);
  const auto factor = Bytes::words(multiplier);
  const auto cap = Bytes::words(Steep ? 1 << (shift - 7) : 0);
  for (int64_t j = 0; j < keys; j += Bytes::width / 2) {
    auto excess = Bytes::load(words + 2 * j);
    excess = Up ? Bytes::add_words(excess, away) : Bytes::sub_words(excess, away);
    if (Steep) excess = Bytes::left(Bytes::min_words(excess, cap), 16 - shift);
    auto product = Bytes::high_product(excess, factor);
    if (!Steep) product = Bytes::right(product, shift - 16);
    Bytes::store_bytes(z + j, product);
  }
}

// z of the keys `first` to `end` of a row, multiples of 32; 255 for those that it does not see.
inline void inhibit_row(const uint8_t* words, const RowView& view, int64_t first, int64_t end, int32_t middle,
                        int32_t multiplier, int32_t shift, uint8_t* z) {
  const int64_t limit = most(0, least(view.limit, end) - first), keys = round_up(limit, kPanelKeys);
  const auto inhibit = shift < 16 ? middle < 0 ? inhibit_words<true, true> : inhibit_words<true, false>
                       : middle < 0 ? inhibit_words<false, true> : inhibit_words<false, false>;
  inhibit(words + 2 * first, keys, middle, multiplier, shift, z);
  if (view.bits) {
    for (int64_t j = 0; j < keys; j += kPanelKeys) {
      const uint32_t hidden = ~view(first + j, kPanelKeys);
      for (uint32_t t = 0; t < kPanelKeys; t++) z[j + t] |= static_cast<uint8_t>(0u - (hidden >> t & 1));
    }
  }
  std::memset(z + limit, 255, static_cast<size_t>(end - first - limit));
}

// Σ max(reach − z, 0) of the first `keys` of a row's block.
inline int32_t heard_in(uint8_t* z, int64_t keys, int32_t reach) {
  const auto nearest = Bytes::words(reach * 257);  // in both bytes of a word
  auto sum = Bytes::zero();  // one word of four counts: 256 keys of 255 at most
  std::memset(z + keys, 255, kAtom);  // what the last vector takes beyond them
  for (int64_t j = 0; j < keys; j += Bytes::width) {
    const auto left = Bytes::remainder(nearest, Bytes::load(z + j));
    sum = Bytes::add_words(sum, Bytes::distance(left, Bytes::zero()));
  }
  uint16_t words[Bytes::width / 2];
  Bytes::store(words, sum);
  int32_t total = 0;
  for (int lane = 0; lane < Bytes::width / 2; lane += 4) total += words[lane];
  return total;
}

// The packed values of some quads of a slice as |v| and sign; of the unsigned form as v, 0 where negative, and 1.
template <bool Signed>
inline void split_values(const int8_t* __restrict from, int64_t quads, uint8_t* __restrict magnitude,
                         uint8_t* __restrict sign) {
  for (int64_t i = 0; i < quads * kAtom; i++) {
    const int8_t v = from[i] < -127 ? int8_t{-127} : from[i];
    const bool negative = v < 0;
    magnitude[i] = static_cast<uint8_t>(!negative ? v : Signed ? -v : 0);
    sign[i] = Signed && negative ? 255 : 1;
  }
}

// The share of some quads of keys in the sums of `Rows` rows and `Atoms` slices.
template <int Rows, int Atoms>
INHIBITOR_APART void integer_tile(const uint8_t* z, int64_t quads, const uint8_t* magnitude, const uint8_t* sign,
                                  int32_t* output, int64_t output_step) {
  constexpr int kVectors = Atoms * kHalves;
  Bytes::Vector sum[Rows][kVectors];
  for (auto& row : sum) {
    for (auto& vector : row) vector = Bytes::zero();
  }
  for (int64_t q = 0; q < quads; q++) {
    Bytes::Vector magnitudes[kVectors], signs[kVectors];
    for (int v = 0; v < kVectors; v++) {
      const int64_t place = v / kHalves * kIntegerBlock * 16 + q * kAtom + v % kHalves * Bytes::width;
      magnitudes[v] = Bytes::load(magnitude + place);
      signs[v] = Bytes::load(sign + place);
    }
    for (int r = 0; r < Rows; r++) {
      const auto inhibition = Bytes::repeat4(z + r * kInhibitionStep + q * 4);
      for (int v = 0; v < kVectors; v++) {
        sum[r][v] = Bytes::add_signed(sum[r][v], Bytes::remainder(magnitudes[v], inhibition), signs[v]);
      }
    }
  }
  for (int r = 0; r < Rows; r++) {
    for (int v = 0; v < kVectors; v++) {
      Bytes::add_totals(output + r * output_step + v * Bytes::width / 4, sum[r][v]);
    }
  }
}

// The share of the keys `first` to `end` in the sums of all rows and some slices.
template <bool Signed, int Atoms>
inline void add_slices(const IntegerMemory& m, const Packed& packed, const RowView* views, int64_t rows, int64_t first,
                       int64_t end, int64_t slice) {
  for (int64_t j = first; j < end; j += kPanelKeys) {
    for (int a = 0; a < Atoms; a++) {
      const int8_t* panel = packed.values + j / kPanelKeys * packed.value_step + (slice + a) * kPanelKeys * 16;
      const int64_t place = (a * kIntegerBlock + j - first) * 16;
      split_values<Signed>(panel, kPanelKeys / 4, m.magnitude + place, m.sign + place);
    }
  }
  for_groups<Bytes::value_rows, 1>(rows, [&](auto group, int64_t r) {
    const int64_t keys = least(end, last_visible(views + r, group())) - first;
    if (keys <= 0) return;
    integer_tile<group(), Atoms>(m.inhibition + r * kInhibitionStep, (keys + 3) / 4, m.magnitude, m.sign,
                                 m.output + r * m.output_step + slice * 16, m.output_step);
  });
}

template <bool Signed>
inline void add_integers(const IntegerProblem& p, int64_t head, const IntegerMemory& m, const Packed& packed,
                         const RowView* views, const int32_t* middles, int64_t rows) {
  const int64_t keys = round_up(last_visible(views, rows), kPanelKeys), slices = value_slices(p);
  for (int64_t first = 0; first < keys; first += kIntegerBlock) {
    const int64_t end = least(keys, first + kIntegerBlock);
    for (int64_t r = 0; r < rows; r++) {
      uint8_t* z = m.inhibition + r * kInhibitionStep;
      inhibit_row(m.distances + r * m.distance_step, views[r], first, end, middles[r], p.multiplier[head],
                  p.shift[head], z);
      if (!p.reach) continue;
      // Behind the sums of values; what pads these adds 0 there.
      const int64_t seen = most(0, least(views[r].limit, end) - first);
      m.output[r * m.output_step + p.value_dim] += heard_in(z, seen, p.reach[head]);
    }
    int64_t slice = 0;
    for (; slice + Bytes::value_atoms <= slices; slice += Bytes::value_atoms) {
      add_slices<Signed, Bytes::value_atoms>(m, packed, views, rows, first, end, slice);
    }
    for (; slice < slices; slice++) add_slices<Signed, 1>(m, packed, views, rows, first, end, slice);
  }
}

// A row of the result: the integers, or each times the row's factor, which is rounded once.
inline void write_sums(const IntegerProblem& p, const Part& part, int64_t row, const int32_t* sums) {
  char* target = at(p.output, 4, part.batch, part.head, row);
  if (!p.factor.data) {
    std::memcpy(target, sums, static_cast<size_t>(p.value_dim + (p.reach ? 1 : 0)) * 4);
    return;
  }
  double exact = *reinterpret_cast<const double*>(at(p.factor, 8, part.batch, part.head, row));
  if (p.reach && p.exponent) {
    const double heard = kUnheard + static_cast<double>(sums[p.value_dim]) / p.reach[part.head];
    exact *= std::pow(heard, -p.exponent[part.head]);
  }
  const float factor = static_cast<float>(exact);
  float* to = reinterpret_cast<float*>(target);
  for (int64_t f = 0; f < p.value_dim; f++) to[f] = static_cast<float>(sums[f]) * factor;
}

// The keys and values of a part's head: as the caller packed them, or packed now, those that some query sees.
inline Fault pack_head(const IntegerProblem& p, const Part& part, const IntegerMemory& m, int64_t* packed) {
  const int64_t key_head = part.head / (p.heads / p.key_heads), name = part.batch * p.heads + part.head;
  if (*packed == name) return kNone;
  *packed = -1;
  if (p.is_packed) {
    *m.selection = {p.is_causal ? least(p.keys, p.queries) : p.keys, nullptr, p.mask.data != nullptr};
  } else {
    *m.selection = select_keys(p, part.batch, part.head, m.index, m.any, m.all);
    const Fault fault = pack(key_reader(p, part.batch, key_head, m.floats),
                             value_reader(p, part.batch, key_head, m.floats), *m.selection, 0, m.keys, m.values, m.codes);
    if (fault) return fault;
  }
  *packed = name;
  return kNone;
}

inline Fault integer_part(const IntegerProblem& p, const Part& part, void* memory, int64_t* packed) {
  Arena arena{static_cast<char*>(memory)};
  const IntegerMemory m(p, arena);
  const RowReader query = query_reader(p, part.batch, part.head, m.floats);
  for (int64_t i = part.begin; i < least(part.begin + kIntegerRows, part.end); i++) query.fetch(i);
  const Fault fault = pack_head(p, part, m, packed);
  if (fault) return fault;
  const int64_t key_head = part.head / (p.heads / p.key_heads);
  Packed head{m.keys, m.values, key_panel_bytes(p), value_panel_bytes(p)};
  if (p.is_packed) {
    head.keys = reinterpret_cast<const uint8_t*>(at(p.key, 1, part.batch, key_head, 0));
    head.values = reinterpret_cast<const int8_t*>(at(p.value, 1, part.batch, key_head, 0));
  }

  for (int64_t first = part.begin; first < part.end; first += kIntegerRows) {
    const int64_t rows = least(kIntegerRows, part.end - first);
    RowView views[kIntegerRows];
    bool nan = false;
    for (int64_t r = 0; r < rows; r++) {
      views[r] = view_row(p, *m.selection, part.batch, part.head, first + r, m.bits + r * m.bit_step);
      uint8_t* codes = m.query + r * m.query_step;
      std::memset(codes + m.query_step - 8, 0, 8);
      nan |= query(first + r, codes) && views[r].limit > 0;
    }
    if (nan) return kNanInQuery;
    int64_t totals[kIntegerRows];
    add_distances(m, head, views, rows, key_groups(p), totals);
    int32_t middles[kIntegerRows];
    for (int64_t r = 0; r < rows; r++) {
      middles[r] = middle_of(totals[r], p.center ? count_visible(views[r]) : 0, p.threshold[part.head]);
      prefetch_target(at(p.output, 4, part.batch, part.head, first + r), p.value_dim);
    }
    for (int64_t i = first + rows; i < least(first + rows + kIntegerRows, part.end); i++) query.fetch(i);
    std::memset(m.output, 0, static_cast<size_t>(rows * m.output_step) * 4);
    if (p.is_signed) {
      add_integers<true>(p, part.head, m, head, views, middles, rows);
    } else {
      add_integers<false>(p, part.head, m, head, views, middles, rows);
    }
    for (int64_t r = 0; r < rows; r++) write_sums(p, part, first + r, m.output + r * m.output_step);
  }
  return kNone;
}

}  // namespace
