// Threads and the choice of kernels for the integer operator: what Python calls.
#include "integer.h"
#include "processor.h"
#include "threads.h"

namespace {

// Best first; the last is always there.
const std::vector<const IntegerKernels*>& available() {
  static const auto found = runnable<IntegerKernels>({
#if defined(INHIBITOR_AVX512)
      avx512vnni_integer_kernels(),
      avx512_integer_kernels(),
#endif
#if defined(INHIBITOR_AVX2)
      avx2_integer_kernels(),
#endif
      portable_integer_kernels()});
  return found;
}

std::atomic<const IntegerKernels*> chosen{nullptr};

const IntegerKernels& kernels_in_use() {
  const IntegerKernels* kernels = chosen.load();
  return *(kernels ? kernels : available().front());
}

}  // namespace

// A Fault.
INHIBITOR_API int32_t inhibitor_integer_forward(const IntegerProblem* problem, int64_t threads) {
  const IntegerProblem& p = *problem;
  const IntegerKernels& kernels = kernels_in_use();
  // An element takes a quarter of the time that it takes in floats.
  if (p.batch * p.heads * p.queries * p.keys * (p.head_dim + p.value_dim) / 8 < kAlone) threads = 1;
  std::atomic<int32_t> fault{kNone};
  const auto work = [&](int64_t head, int64_t begin, int64_t end, void* data, int64_t* packed) {
    if (fault.load()) return;
    const Fault found = kernels.forward(p, {head / p.heads, head % p.heads, begin, end}, data, packed);
    if (found) fault = found;
  };
  const bool done = for_each_part(p.batch * p.heads, p.queries, threads, kernels.forward_bytes(p), work);
  return done ? fault.load() : kNoMemory;
}

// Packs the problem's keys and values behind `length` that are packed already: `keys` and `values` are tensors of bytes
// (batch, key heads, panels, bytes of a panel). A Fault.
INHIBITOR_API int32_t inhibitor_integer_append(const IntegerProblem* problem, const Strided* keys,
                                               const Strided* values, int64_t length, int64_t threads) {
  const IntegerProblem& p = *problem;
  const IntegerKernels& kernels = kernels_in_use();
  if (p.batch * p.key_heads * p.keys * (p.head_dim + p.value_dim) < kAlone) threads = 1;
  std::atomic<int32_t> fault{kNone};
  const auto head_of = [](const Strided& tensor, int64_t batch, int64_t head) {
    return static_cast<char*>(tensor.data) + batch * tensor.stride[0] + head * tensor.stride[1];
  };
  const bool done = for_each(p.batch * p.key_heads, threads, kernels.append_bytes(p),
                             [&](int64_t item, void* data, int64_t*) {
                               const int64_t batch = item / p.key_heads, head = item % p.key_heads;
                               const Fault found = kernels.append(
                                   p, batch, head, length, reinterpret_cast<uint8_t*>(head_of(*keys, batch, head)),
                                   reinterpret_cast<int8_t*>(head_of(*values, batch, head)), data);
                               if (found) fault = found;
                             });
  return done ? fault.load() : kNoMemory;
}

// Puts rows of a linear layer's inputs on their grid; `multiplier` has a number for each feature. A Fault.
INHIBITOR_API int32_t inhibitor_integer_codes(const float* x, const float* multiplier, int64_t zero, int64_t rows,
                                              int64_t features, uint8_t* codes, int64_t threads) {
  const IntegerKernels& kernels = kernels_in_use();
  if (rows * features < kAlone) threads = 1;
  const int64_t block = divide(rows, 4 * threads);
  std::atomic<bool> nan{false};
  const bool done = for_each(divide(rows, block), threads, 1, [&](int64_t item, void*, int64_t*) {
    const int64_t end = item * block + block < rows ? item * block + block : rows;
    for (int64_t row = item * block; row < end; row++) {
      const int64_t start = row * features;
      if (kernels.codes(x + start, multiplier, static_cast<int32_t>(zero), features, codes + start)) nan = true;
    }
  });
  return !done ? kNoMemory : nan.load() ? kNanInInput : kNone;
}

// Bytes of an IntegerProblem, which Python packs.
INHIBITOR_API int64_t inhibitor_integer_problem_bytes() { return sizeof(IntegerProblem); }

// The names of the instruction sets that this processor can run, best first, with spaces between.
INHIBITOR_API const char* inhibitor_integer_available() {
  static const std::string names = names_of(available());
  return names.c_str();
}

// Takes one of them for all calls from now on, unless the name is null; returns the name of what is in use.
INHIBITOR_API const char* inhibitor_integer_choose(const char* name) {
  if (const IntegerKernels* found = named(available(), name)) chosen = found;
  return kernels_in_use().name;
}
