#include "kernels.h"

#include <cstdlib>
#include <string_view>

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

namespace {

const Kernels& best() {
#if defined(__x86_64__)
  const char* named = std::getenv("ATEN_CPU_CAPABILITY");  // NOLINT(concurrency-mt-unsafe): once, as torch does
  const std::string_view limit = named == nullptr ? "" : named;
  // __builtin_cpu_supports checks the processor, and also whether the operating system saves the registers.
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && limit != "avx2" && limit != "default") return avx512::table;
  if (has_avx2 && limit != "default") return avx2::table;
#endif
  return baseline::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = best();
  return table;
}

}  // namespace tlcr::cpu
