// Which of the kernels that were built this processor can run.
#pragma once

#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#if defined(_MSC_VER)
#include <intrin.h>
#endif

inline bool processor_has(const char* name) {
  bool avx2 = false, avx512 = false, vnni = false;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#elif defined(_M_X64)
  int one[4], seven[4];
  __cpuidex(one, 1, 0);
  __cpuidex(seven, 7, 0);
  const bool saved = one[2] >> 27 & 1;  // the system saves what _xgetbv says
  const unsigned long long state = saved ? _xgetbv(0) : 0;
  avx2 = (state & 0x6) == 0x6 && (one[2] >> 12 & 1) && (one[2] >> 23 & 1) && (seven[1] >> 5 & 1) &&
         (seven[1] >> 8 & 1);
  avx512 = avx2 && (state & 0xE6) == 0xE6 && (seven[1] >> 16 & 1) && (seven[1] >> 17 & 1) && (seven[1] >> 30 & 1) &&
           (seven[1] >> 31 & 1);
  vnni = avx512 && (seven[2] >> 11 & 1);
#endif
  if (std::strcmp(name, "avx512vnni") == 0) return vnni;
  if (std::strcmp(name, "avx512") == 0) return avx512;
  return std::strcmp(name, "avx2") == 0 ? avx2 : true;
}

// Those that the processor can run, in the same order.
template <class Kernels>
std::vector<const Kernels*> runnable(std::initializer_list<const Kernels*> built) {
  std::vector<const Kernels*> list;
  for (const Kernels* kernels : built) {
    if (processor_has(kernels->name)) list.push_back(kernels);
  }
  return list;
}

// Their names, with spaces between.
template <class Kernels>
std::string names_of(const std::vector<const Kernels*>& list) {
  std::string names;
  for (const Kernels* kernels : list) names.append(names.empty() ? "" : " ").append(kernels->name);
  return names;
}

// The one of that name; null if there is none, or no name.
template <class Kernels>
const Kernels* named(const std::vector<const Kernels*>& list, const char* name) {
  for (const Kernels* kernels : list) {
    if (name && std::strcmp(name, kernels->name) == 0) return kernels;
  }
  return nullptr;
}
