// The integer operator: what a call is beside a Problem, and the interface between its driver and its kernels.
#pragma once

#include <cstddef>

#include "kernels.h"

enum Code : int64_t { kCodes = 3 };  // a dtype: uint8 queries and keys, int8 values

// Every field is eight bytes, as in Problem; γ, δ, the float τ and all gradients of that are null.
struct IntegerProblem : Problem {
  const float* query_key_inverse;  // 1 ÷ step, (heads); null for codes
  const float* value_inverse;      // likewise
  const int32_t* multiplier;       // (heads)
  const int32_t* shift;            // (heads)
  const int32_t* threshold;        // (heads)
  const int32_t* reach;            // (heads); null: none. Integers have one feature more then, what is heard
  Strided factor;          // float64, (batch, heads, queries, 1): the result is float32 then; data null: it is int32
  const double* exponent;  // (heads): with a reach and a factor, ρ in factor · heard^(−ρ); null: 0
  int64_t is_packed;  // key and value are packed: strides in bytes, the third from panel to panel
};

// What keeps a call from a result.
enum Fault : int32_t { kNone = 0, kNoMemory = 1, kNanInQuery = 2, kNanInKey = 3, kNanInValue = 4, kNanInInput = 5 };

struct IntegerKernels {
  const char* name;

  // A thread works on parts in the memory that it owns; `packed` is the head that it holds from its last part, or -1.
  size_t (*forward_bytes)(const IntegerProblem&);
  Fault (*forward)(const IntegerProblem&, const Part&, void* memory, int64_t* packed);

  // The keys and values of one key head, packed behind `length` that are there already.
  size_t (*append_bytes)(const IntegerProblem&);
  Fault (*append)(const IntegerProblem&, int64_t batch, int64_t key_head, int64_t length, uint8_t* keys,
                  int8_t* values, void* memory);

  // A row of a linear layer's inputs; true if there is a NaN.
  bool (*codes)(const float* x, const float* multiplier, int32_t zero, int64_t count, uint8_t* to);
};

// The builds that the compiler could make: INHIBITOR_AVX512 and INHIBITOR_AVX2 say which.
const IntegerKernels* avx512vnni_integer_kernels();
const IntegerKernels* avx512_integer_kernels();
const IntegerKernels* avx2_integer_kernels();
const IntegerKernels* portable_integer_kernels();
