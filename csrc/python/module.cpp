// tlcr._C: tells for which Python a checkout was compiled. The kernels are in libtlcr.so, which knows no Python, and a
// wheel has no more than that.
#include <patchlevel.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Facts of a build in a checkout. tlcr.build_info() tells them with all others.";
  module.def("build_info", [] {
    py::dict info;
    info["python"] = PY_VERSION;
    info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
    return info;
  });
}
