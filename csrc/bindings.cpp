// Module _C: what this build is. Never tensors; the package works without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "core/driver.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream stream(list);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = TOKENMILL_VERSION;
  info["compiler"] = TOKENMILL_CXX_COMPILER;
  info["cpu_isas"] = split(TOKENMILL_ISAS);
  info["cuda_version"] = TOKENMILL_CUDA_VERSION;
  info["cuda_archs"] = split(TOKENMILL_CUDA_ARCHS);
  const int driver = tokenmill::least_driver(std::atoi(TOKENMILL_CUDA_VERSION));
  info["cuda_driver"] = driver > 0 ? std::to_string(driver) : "";
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of tokenmill.";
  m.def("build_info", &build_info, "Version, compilers, instruction sets and GPU architectures.");
}
