// Threads and the memory that each of them keeps, for all that the library does.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

#if defined(_WIN32)
#include <malloc.h>
#define INHIBITOR_API extern "C" __declspec(dllexport)
#else
#include <sys/mman.h>
#define INHIBITOR_API extern "C" __attribute__((visibility("default")))
#endif

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// PyTorch's own threads, by its stable C interface: a pool of ours would compete with it for the cores.
inline std::atomic<ParallelFor> parallel_for{nullptr};
// The child of a fork has none of its parent's threads, and OpenMP would wait for them.
inline std::atomic<bool> forked{false};

// Memory that a thread keeps from call to call, unless it has grown large.
class Memory {
 public:
  ~Memory() { drop(); }

  void* at_least(size_t bytes) {
    if (bytes > size_) {
      drop();
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
    if (size_ > kKept) drop();
  }

 private:
  void drop() {
#if defined(_WIN32)
    _aligned_free(data_);
#else
    std::free(data_);
#endif
    data_ = nullptr;
    size_ = 0;
  }

  static constexpr size_t kHuge = size_t{2} << 20;
  static constexpr size_t kKept = size_t{8} << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline thread_local Memory memory;

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

inline int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs work(head, begin, end, memory, packed) for parts of every head's queries: some for each thread, so that none waits
// long for the last; but every part packs the keys of its head anew. False: no memory.
template <class Work>
bool for_each_part(int64_t heads, int64_t queries, int64_t threads, size_t bytes, const Work& work) {
  const int64_t blocks = divide(queries, 32), most = heads < threads ? blocks : divide(blocks, 4);
  int64_t splits = threads == 1 ? 1 : divide(16 * threads, heads);
  splits = splits < most ? splits : most;
  const int64_t rows = divide(blocks, splits) * 32;
  splits = divide(queries, rows);
  return for_each(heads * splits, threads, bytes, [&](int64_t item, void* data, int64_t* packed) {
    const int64_t begin = (splits - 1 - item % splits) * rows;  // long causal rows first
    work(item / splits, begin, begin + rows < queries ? begin + rows : queries, data, packed);
  });
}
