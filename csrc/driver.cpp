// Threads, memory and the choice of kernels: what Python calls.
#include <memory>
#include <new>

#include "kernels.h"
#include "processor.h"
#include "threads.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace {

std::atomic<const Kernels*> chosen{nullptr};

int64_t elements(const Problem& p) {
  return p.batch * p.heads * p.queries * p.keys * (p.head_dim + p.value_dim) / 2;
}

// Best first; the last is always there.
const std::vector<const Kernels*>& available() {
  static const auto found = runnable<Kernels>({
#if defined(INHIBITOR_AVX512)
      avx512_kernels(),
#endif
#if defined(INHIBITOR_AVX2)
      avx2_kernels(),
#endif
      portable_kernels()});
  return found;
}

// The first row of a head.
char* head_of(const Strided& tensor, int64_t element, int64_t batch, int64_t head) {
  return static_cast<char*>(tensor.data) + (batch * tensor.stride[0] + head * tensor.stride[1]) * element;
}

// Queries up to which keys are read where they lie.
constexpr int64_t kFew = 4;
// Keys of a part: fixed, so that sums do not depend on the number of threads.
constexpr int64_t kChunk = 512;
// Scores that are held at once, 16 MiB of them, if they are not those of one key head.
constexpr int64_t kScores = int64_t{1} << 22;

// The key heads of all batches from `first` on, `heads` of them.
int32_t decode_heads(const Problem& p, int64_t first, int64_t heads, int64_t threads) {
  const Kernels& kernels = *chosen.load();
  const int64_t rows = p.heads / p.key_heads * p.queries;
  const int64_t chunks = divide(p.keys, kChunk), parts = heads * chunks, step = kernels.output_step(p);
  const int64_t features = p.value_dim + (p.reach ? 1 : 0);
  const std::unique_ptr<float[]> scores(new (std::nothrow) float[heads * rows * p.keys]);
  const std::unique_ptr<float[]> outputs(new (std::nothrow) float[parts * rows * step]);
  const std::unique_ptr<float[]> means(new (std::nothrow) float[heads * rows]);
  const std::unique_ptr<double[]> sums(new (std::nothrow) double[parts * rows]);
  const std::unique_ptr<int64_t[]> counts(new (std::nothrow) int64_t[parts * rows]);
  if (!scores || !outputs || !means || !sums || !counts) return 1;

  const auto key_part = [&](int64_t item) {
    const int64_t head = first + item / chunks, begin = item % chunks * kChunk;
    const int64_t end = begin + kChunk < p.keys ? begin + kChunk : p.keys;
    return KeyPart{head / p.key_heads, head % p.key_heads, begin, end};
  };
  const size_t bytes = kernels.decode_bytes(p);
  const bool scored = for_each(parts, threads, bytes, [&](int64_t item, void* data, int64_t*) {
    kernels.decode_scores(p, key_part(item), scores.get() + item / chunks * rows * p.keys, sums.get() + item * rows,
                          counts.get() + item * rows, data);
  });
  if (!scored) return 1;
  for (int64_t head = 0; head < heads; head++) {
    for (int64_t r = 0; r < rows; r++) {
      double sum = 0.0;
      int64_t count = 0;
      for (int64_t part = head * chunks; part < (head + 1) * chunks; part++) {
        sum += sums[part * rows + r];
        count += counts[part * rows + r];
      }
      means[head * rows + r] = p.center && count ? static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
    }
  }
  const bool added = for_each(parts, threads, bytes, [&](int64_t item, void* data, int64_t*) {
    const int64_t head = item / chunks;
    kernels.decode_values(p, key_part(item), scores.get() + head * rows * p.keys, means.get() + head * rows,
                          outputs.get() + item * rows * step, data);
  });
  if (!added) return 1;
  for (int64_t row = 0; row < heads * rows; row++) {
    // Rows of a key head are its heads' queries.
    const int64_t head = first * rows / p.queries + row / p.queries, query = row % p.queries;
    char* place = head_of(p.output, 4, head / p.heads, head % p.heads) + query * p.output.stride[2] * 4;
    float* target = reinterpret_cast<float*>(place);
    for (int64_t f = 0; f < features; f++) target[f] = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const float* part = outputs.get() + ((row / rows * chunks + chunk) * rows + row % rows) * step;
      for (int64_t f = 0; f < p.value_dim; f++) target[f] += part[f];
      if (p.reach) target[p.value_dim] += part[step - 1];
    }
  }
  return 0;
}

int32_t decode(const Problem& p, int64_t threads) {
  const int64_t heads = p.batch * p.key_heads, scores = p.heads / p.key_heads * p.queries * p.keys;
  const int64_t together = scores > 0 && scores < kScores ? kScores / scores : 1;
  for (int64_t first = 0; first < heads; first += together) {
    const int32_t fault = decode_heads(p, first, first + together < heads ? together : heads - first, threads);
    if (fault) return fault;
  }
  return 0;
}

}  // namespace

// 0: done; 1: out of memory.
INHIBITOR_API int32_t inhibitor_forward(const Problem* problem, int64_t threads) {
  const Problem& p = *problem;
  const Kernels& kernels = *chosen.load();
  if (elements(p) < kAlone) threads = 1;
  if (p.queries <= kFew) return decode(p, threads);
  const auto work = [&](int64_t head, int64_t begin, int64_t end, void* data, int64_t* packed) {
    kernels.forward(p, {head / p.heads, head % p.heads, begin, end}, data, packed);
  };
  return for_each_part(p.batch * p.heads, p.queries, threads, kernels.forward_bytes(p), work) ? 0 : 1;
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
      result = {head_of(p.grad_key, element, head / p.heads, head % p.heads),
                head_of(p.grad_value, element, head / p.heads, head % p.heads),
                p.grad_key.stride[2],
                p.grad_value.stride[2],
                p.dtype};
    } else {
      float* sums = partial.get() + item * (key_size + value_size);
      result = {reinterpret_cast<char*>(sums), reinterpret_cast<char*>(sums + key_size), p.head_dim, p.value_dim,
                kFloat32};
    }
    kernels.backward(p, {head / p.heads, head % p.heads, begin, end}, result, data);
  };
  if (!for_each(parts, threads, kernels.backward_bytes(p), work)) return 1;

  if (!direct) {
    const int64_t together = group * splits;  // parts of one key head lie side by side
    const bool added = for_each(p.batch * p.key_heads, threads, 64, [&](int64_t head, void*, int64_t*) {
      float* sum = partial.get() + head * together * (key_size + value_size);
      for (int64_t t = 1; t < together; t++) {
        const float* other = sum + t * (key_size + value_size);
        for (int64_t i = 0; i < key_size + value_size; i++) sum[i] += other[i];
      }
      const int64_t batch = head / p.key_heads, key_head = head % p.key_heads;
      char* key = head_of(p.grad_key, element, batch, key_head);
      char* value = head_of(p.grad_value, element, batch, key_head);
      for (int64_t j = 0; j < p.keys; j++) {
        kernels.write(sum + j * p.head_dim, p.dtype, p.head_dim, key + j * p.grad_key.stride[2] * element);
        kernels.write(sum + key_size + j * p.value_dim, p.dtype, p.value_dim,
                      value + j * p.grad_value.stride[2] * element);
      }
    });
    if (!added) return 1;
  }
  for (int64_t head = 0; head < p.heads; head++) {
    double gamma = 0.0, delta = 0.0, reach = 0.0;
    for (int64_t batch = 0; batch < p.batch; batch++) {
      for (int64_t split = 0; split < splits; split++) {
        const KeyGradients& result = results[(batch * p.heads + head) * splits + split];
        gamma += result.gamma;
        delta += result.delta;
        reach += result.reach;
      }
    }
    p.grad_gamma[head] = static_cast<float>(gamma);
    p.grad_delta[head] = static_cast<float>(delta);
    if (p.reach) p.grad_reach[head] = static_cast<float>(reach);
  }
  return 0;
}

// The names of the instruction sets that this processor can run, best first, with spaces between.
INHIBITOR_API const char* inhibitor_available() {
  static const std::string names = names_of(available());
  return names.c_str();
}

// Takes one of them for all calls from now on, unless the name is null; returns the name of what is in use.
INHIBITOR_API const char* inhibitor_choose(const char* name) {
  if (const Kernels* found = named(available(), name)) chosen = found;
  return chosen.load()->name;
}

// Bytes of a Problem, which Python packs.
INHIBITOR_API int64_t inhibitor_problem_bytes() { return sizeof(Problem); }

INHIBITOR_API void inhibitor_start(ParallelFor parallel) {
  parallel_for = parallel;
  chosen = available().front();
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
}
