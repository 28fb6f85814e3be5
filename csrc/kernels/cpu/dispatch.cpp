#include "kernels.h"

#include <cstring>

namespace tlcr::cpu {

namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

const Kernels& kernels(const char* capability) {
#if defined(__x86_64__)
  // __builtin_cpu_supports checks the processor, and also whether the operating system saves the registers.
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool allows_avx512 = std::strcmp(capability, "AVX512") == 0;
  if (has_avx512 && allows_avx512) return avx512::table;
  if (has_avx2 && (allows_avx512 || std::strcmp(capability, "AVX2") == 0)) return avx2::table;
#else
  static_cast<void>(capability);
#endif
  return baseline::table;
}

}  // namespace tlcr::cpu
