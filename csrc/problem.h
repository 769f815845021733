// What one call is: sizes, strides, pointers. Shared by Python (through ctypes), the driver and the kernels.
#pragma once

#include <cstdint>

// Four dimensions, strides in elements; (batch, heads, length, features) or, for a mask, (batch, heads, queries, keys).
struct Strided {
  void* data;
  int64_t stride[4];
};

enum Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Every field is eight bytes, so that the layout is the same for every compiler.
struct Problem {
  int64_t batch, heads, key_heads, queries, keys, head_dim, value_dim;
  int64_t dtype;  // of query, key, value and their gradients
  int64_t is_causal, center, is_signed;
  double scale;
  Strided query, key, value;
  Strided mask;         // bytes, 0 = hidden; data null: everything is visible
  const float* gamma;   // (heads)
  const float* delta;   // (heads)
  const float* reach;   // (heads), or null
  Strided output;       // float32, with a reach one feature more; here and in the gradients features lie side by side
  Strided grad_output;  // float32, as the output
  Strided grad_query, grad_key, grad_value;  // in the inputs' dtype
  float* grad_gamma;  // (heads)
  float* grad_delta;  // (heads)
  float* grad_reach;  // (heads), if there is a reach
};
