// Module _C: build information, and every operator of the library without torch's dispatcher. The
// package works without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "core/driver.h"
#include "core/exchange.h"
#include "core/watch.h"

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
  const int driver = tokenmill::min_driver(std::atoi(TOKENMILL_CUDA_VERSION));
  info["cuda_driver"] = driver > 0 ? std::to_string(driver) : "";
  return info;
}

// Operators of a loaded library by name, each as two functions (core/exchange.h).
py::dict operators(const std::string& path) {
  const tokenmill::Library& library = tokenmill::exchange::library_of(path);
  py::dict all;
  for (tokenmill::Operator* op : library.operators) {
    PyObject* const functions = tokenmill::exchange::functions_of(*op, library);
    if (!functions) throw py::error_already_set();
    all[op->name] = py::reinterpret_steal<py::object>(functions);
  }
  return all;
}

bool is_watched() {
  const auto* const watch = tokenmill::exchange::Watch::get();
  const int answer = watch ? watch->any() : -1;
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of tokenmill, and its operators.";
  m.def("build_info", &build_info, "Version, compilers, instruction sets and GPU architectures.");
  m.def("is_watched", &is_watched, "Whether torch does more with a call than to run it.");
  m.def("operators", &operators, py::arg("path"), "The operators of a loaded library by name.");
}
