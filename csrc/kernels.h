// The interface between the driver, which knows threads and memory, and the kernels of one instruction set.
#pragma once

#include <cstddef>

#include "problem.h"

// Some query rows of one head.
struct Part {
  int64_t batch, head;
  int64_t begin, end;  // rows
};

// Where the gradients of one part's keys and values go: rows of the tensors themselves, or of a partial sum.
struct KeyGradients {
  char *key, *value;  // rows of head_dim and of value_dim
  int64_t key_step, value_step;  // from row to row, in elements
  int64_t dtype;
  double gamma = 0.0, delta = 0.0, reach = 0.0;  // filled in
};

// Some keys of one key head, for all queries of the heads that share it.
struct KeyPart {
  int64_t batch, key_head;
  int64_t begin, end;  // keys
};

struct Kernels {
  const char* name;

  // A thread works on parts in the memory that it owns; `packed` is the head that it holds from its last part, or -1.
  size_t (*forward_bytes)(const Problem&);
  void (*forward)(const Problem&, const Part&, void* memory, int64_t* packed);

  size_t (*backward_bytes)(const Problem&);
  void (*backward)(const Problem&, const Part&, KeyGradients&, void* memory);

  // Floats into a contiguous array of any dtype.
  void (*write)(const float*, int64_t dtype, int64_t count, void*);

  // Few queries against many keys: rows are the queries of all heads that share a key head. Scores (rows, keys) with
  // their sum and the number of visible keys for every row; then, with their means, the part's share of the result,
  // (rows, output_step), what is left of a reach behind the values.
  size_t (*decode_bytes)(const Problem&);
  void (*decode_scores)(const Problem&, const KeyPart&, float* scores, double* sums, int64_t* counts, void* memory);
  void (*decode_values)(const Problem&, const KeyPart&, const float* scores, const float* means, float* output,
                        void* memory);
  int64_t (*output_step)(const Problem&);
};

// The builds that the compiler could make: INHIBITOR_AVX512 and INHIBITOR_AVX2 say which.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();
