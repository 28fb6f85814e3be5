// tlcr._C: tells how the kernels were compiled. Importing it also registers the kernels with torch, by bindings.cpp.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#ifdef TLCR_CUDA
#include <cuda_runtime_api.h>
#endif

#include <string>

#include "kernels/cpu/kernels.h"

namespace {

namespace py = pybind11;

// Facts that only the compiler knows; tlcr.build_info() adds what setup.py wrote beside the library.
py::dict build_info(const std::string& cpu_capability) {
  py::dict info;
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch"] = TORCH_VERSION;
#ifdef TLCR_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  info["cuda"] = py::none();
#endif
  info["instruction_set"] = tlcr::cpu::kernels(cpu_capability.c_str()).instruction_set;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "tlcr's compiled kernels. tlcr.ops is the door to them; tlcr.build_info() tells how they were built.";
  module.def("build_info", &build_info, py::arg("cpu_capability"));
}
