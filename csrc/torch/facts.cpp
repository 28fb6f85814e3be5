#include "facts.h"

#include <torch/headeronly/version.h>

#ifdef TLCR_CUDA
#include <cuda_runtime_api.h>
#endif

#include "kernels/cpu/kernels.h"
#include "product.h"

namespace tlcr {
namespace {

#ifdef __clang__
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

std::string quoted(const std::string& text) { return '"' + text + '"'; }

// As JSON. tlcr.build_info() adds what setup.py wrote beside the library.
std::string facts() {
  std::string operators;
  for (const auto& [name, signature] : signatures())
    operators += (operators.empty() ? "" : ", ") + quoted(name) + ": " + quoted(signature);
#ifdef TLCR_CUDA
  const std::string cuda =
      quoted(std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10));
#else
  const std::string cuda = "null";
#endif
  const std::string multiplies_bfloat16 = cpu_multiplies_bfloat16() ? "true" : "false";
  return "{\"compiler\": " + quoted(kCompiler) + ", \"torch\": " + quoted(TORCH_VERSION) + ", \"cuda\": " + cuda +
         ", \"instruction_set\": " + quoted(cpu::kernels().instruction_set) +
         ", \"multiplies_bfloat16\": " + multiplies_bfloat16 + ", \"operators\": {" + operators + "}}";
}

STABLE_TORCH_LIBRARY_FRAGMENT(tlcr, m) {
  m.def("library_facts() -> str");
  m.impl("library_facts", TORCH_BOX(&facts));
}

}  // namespace

std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> found;
  return found;
}

}  // namespace tlcr
