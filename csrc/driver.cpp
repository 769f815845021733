// Threads, memory and the choice of kernels: what Python calls.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(_WIN32)
#define INHIBITOR_API extern "C" __declspec(dllexport)
#else
#include <pthread.h>
#include <sys/mman.h>
#define INHIBITOR_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// PyTorch's own threads, by its stable C interface: a pool of ours would compete with it for the cores.
std::atomic<ParallelFor> parallel_for{nullptr};
std::atomic<const Kernels*> chosen{nullptr};
// The child of a fork has none of its parent's threads, and OpenMP would wait for them.
std::atomic<bool> forked{false};

// Memory that a thread keeps from call to call, unless it has grown large.
class Memory {
 public:
  ~Memory() { std::free(data_); }

  void* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const size_t page = bytes < kHuge ? 4096 : kHuge;
      const size_t rounded = (bytes + page - 1) / page * page;
#if defined(_WIN32)
      data_ = _aligned_malloc(rounded, page);
#else
      data_ = std::aligned_alloc(page, rounded);
#endif
#if defined(__linux__)
      if (data_ && page == kHuge) madvise(data_, rounded, MADV_HUGEPAGE);  // fewer address translations
#endif
      if (data_) size_ = rounded;
    }
    return data_;
  }

  void release() {
    if (size_ <= kKept) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  static constexpr size_t kKept = size_t{8} << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Memory memory;

// Elements below which a second thread costs more than it brings.
constexpr int64_t kAlone = int64_t{1} << 18;

// Runs work(item, memory, state) for every item; whichever thread is free takes the next. False: no memory.
template <class Work>
bool for_each(int64_t items, int64_t threads, size_t bytes, const Work& work) {
  struct Context {
    const Work* work;
    int64_t items;
    size_t bytes;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
  } context{&work, items, bytes};

  const Body body = [](int64_t, int64_t, void* pointer) {
    Context& shared = *static_cast<Context*>(pointer);
    int64_t item = shared.next.fetch_add(1);
    if (item >= shared.items) return;
    void* data = memory.at_least(shared.bytes);
    if (!data) {
      shared.failed = true;
      return;
    }
    for (int64_t state = -1; item < shared.items; item = shared.next.fetch_add(1)) {
      (*shared.work)(item, data, &state);
    }
    memory.release();
  };

  threads = threads < items ? threads : items;
  const ParallelFor parallel = parallel_for;
  if (threads > 1 && parallel && !forked) {
    parallel(0, threads, 1, body, &context);
  } else {
    body(0, 1, &context);
  }
  return !context.failed;
}

int64_t elements(const Problem& p) {
  return p.batch * p.heads * p.queries * p.keys * (p.head_dim + p.value_dim) / 2;
}

bool processor_has(const char* name) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (std::strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return std::strcmp(name, "portable") == 0;
}

// Best first; the last is always there.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> list;
    for (const Kernels* kernels : {
#if defined(INHIBITOR_AVX512)
             avx512_kernels(),
#endif
#if defined(INHIBITOR_AVX2)
             avx2_kernels(),
#endif
             portable_kernels()}) {
      if (processor_has(kernels->name)) list.push_back(kernels);
    }
    return list;
  }();
  return found;
}

int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// 0: done; 1: out of memory.
INHIBITOR_API int32_t inhibitor_forward(const Problem* problem, int64_t threads) {
  const Problem& p = *problem;
  const Kernels& kernels = *chosen.load();
  if (elements(p) < kAlone) threads = 1;
  // Some parts for each thread, so that none waits long for the last; whole heads where there are many.
  const int64_t heads = p.batch * p.heads;
  int64_t splits = threads == 1 ? 1 : divide(16 * threads, heads);
  const int64_t blocks = divide(p.queries, 32);
  splits = splits < blocks ? splits : blocks;
  const int64_t rows = divide(blocks, splits) * 32;
  splits = divide(p.queries, rows);
  const bool done = for_each(heads * splits, threads, kernels.forward_bytes(p),
                             [&](int64_t item, void* data, int64_t* packed) {
                               const int64_t head = item / splits;
                               const int64_t begin = (splits - 1 - item % splits) * rows;  // long causal rows first
                               const int64_t end = begin + rows < p.queries ? begin + rows : p.queries;
                               kernels.forward(p, {head / p.heads, head % p.heads, begin, end}, data, packed);
                             });
  return done ? 0 : 1;
}

INHIBITOR_API int32_t inhibitor_backward(const Problem* problem, int64_t threads) {
  const Problem& p = *problem;
  const Kernels& kernels = *chosen.load();
  if (elements(p) < kAlone) threads = 1;
  // One part for each head, more where heads are few; the sums of several parts are added up in a fixed order.
  const int64_t heads = p.batch * p.heads, group = p.heads / p.key_heads;
  const int64_t wanted = threads == 1 ? 1 : divide(4 * threads, heads);
  const int64_t blocks = divide(p.queries, 64);
  int64_t splits = wanted < blocks ? wanted : blocks;
  const int64_t rows = divide(blocks, splits) * 64;
  splits = divide(p.queries, rows);
  const int64_t parts = heads * splits;
  const bool direct = group == 1 && splits == 1;
  const int64_t key_size = p.keys * p.head_dim, value_size = p.keys * p.value_dim;
  const int64_t element = p.dtype == kFloat32 ? 4 : 2;
  const std::unique_ptr<float[]> partial(direct ? nullptr : new (std::nothrow) float[parts * (key_size + value_size)]);
  const std::unique_ptr<KeyGradients[]> results(new (std::nothrow) KeyGradients[parts]);
  if (!results || (!direct && !partial)) return 1;

  const auto work = [&](int64_t item, void* data, int64_t*) {
    const int64_t head = item / splits;
    const int64_t begin = (splits - 1 - item % splits) * rows;
    const int64_t end = begin + rows < p.queries ? begin + rows : p.queries;
    KeyGradients& result = results[item];
    if (direct) {
      result = {static_cast<char*>(p.grad_key) + head * key_size * element,
                static_cast<char*>(p.grad_value) + head * value_size * element, p.dtype, 0.0, 0.0};
    } else {
      float* sums = partial.get() + item * (key_size + value_size);
      result = {sums, sums + key_size, kFloat32, 0.0, 0.0};
    }
    kernels.backward(p, {head / p.heads, head % p.heads, begin, end}, result, data);
  };
  if (!for_each(parts, threads, kernels.backward_bytes(p), work)) return 1;

  if (!direct) {
    const int64_t together = group * splits;  // parts of one key head lie side by side
    for_each(p.batch * p.key_heads, threads, 64, [&](int64_t head, void*, int64_t*) {
      float* sum = partial.get() + head * together * (key_size + value_size);
      for (int64_t t = 1; t < together; t++) {
        const float* other = sum + t * (key_size + value_size);
        for (int64_t i = 0; i < key_size + value_size; i++) sum[i] += other[i];
      }
      kernels.write(sum, p.dtype, key_size, static_cast<char*>(p.grad_key) + head * key_size * element);
      kernels.write(sum + key_size, p.dtype, value_size,
                    static_cast<char*>(p.grad_value) + head * value_size * element);
    });
  }
  for (int64_t head = 0; head < p.heads; head++) {
    double gamma = 0.0, delta = 0.0;
    for (int64_t batch = 0; batch < p.batch; batch++) {
      for (int64_t split = 0; split < splits; split++) {
        const KeyGradients& result = results[(batch * p.heads + head) * splits + split];
        gamma += result.gamma;
        delta += result.delta;
      }
    }
    p.grad_gamma[head] = static_cast<float>(gamma);
    p.grad_delta[head] = static_cast<float>(delta);
  }
  return 0;
}

// The names of the instruction sets that this processor can run, best first, with spaces between.
INHIBITOR_API const char* inhibitor_available() {
  static const std::string names = [] {
    std::string list;
    for (const Kernels* kernels : available()) list += (list.empty() ? "" : " ") + std::string(kernels->name);
    return list;
  }();
  return names.c_str();
}

// Takes one of them for all calls from now on, unless the name is null; returns the name of what is in use.
INHIBITOR_API const char* inhibitor_choose(const char* name) {
  for (const Kernels* kernels : available()) {
    if (name && std::strcmp(name, kernels->name) == 0) chosen = kernels;
  }
  return chosen.load()->name;
}

INHIBITOR_API void inhibitor_start(ParallelFor parallel) {
  parallel_for = parallel;
  chosen = available().front();
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
}
