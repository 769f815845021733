// The integer kernels, compiled once for every instruction set: INHIBITOR_SIMD and INHIBITOR_BYTES name its headers,
// INHIBITOR_KERNELS the function that hands the kernels out. As in kernels.cpp, nothing else has external linkage.
#include INHIBITOR_SIMD
#include INHIBITOR_BYTES

#include "codes.h"
#include "integer_forward.h"

namespace {

size_t integer_bytes(const IntegerProblem& p) {
  Arena arena{nullptr};
  IntegerMemory memory(p, arena);
  return arena.used;
}

size_t append_bytes(const IntegerProblem& p) {
  return static_cast<size_t>(round_up(most(key_groups(p) * 8, value_slices(p) * 64), 64) +
                             most(p.head_dim, p.value_dim) * 4);
}

Fault append(const IntegerProblem& p, int64_t batch, int64_t key_head, int64_t length, uint8_t* keys, int8_t* values,
             void* memory) {
  Arena arena{static_cast<char*>(memory)};
  auto* codes = arena.take<uint8_t>(most(key_groups(p) * 8, value_slices(p) * 64));
  auto* floats = arena.take<float>(most(p.head_dim, p.value_dim));
  return pack(key_reader(p, batch, key_head, floats), value_reader(p, batch, key_head, floats), {p.keys, nullptr, false},
              length, keys, values, codes);
}

const IntegerKernels kernels = {Bytes::name, integer_bytes, integer_part, append_bytes, append, put_on_grid};

}  // namespace

const IntegerKernels* INHIBITOR_KERNELS() { return &kernels; }
