// The short door: operators as functions of Python, which see torch's tensors through the C
// functions of DLPack.
#pragma once
#include <Python.h>

#include <string>

#include "core/door.h"

namespace tokenmill::exchange {

// A library of this package that the process has loaded.
const Library& library_of(const std::string& path);

// A new reference to a function of Python; null with an error set.
PyObject* function_of(Operator& op, const Library& library);

}  // namespace tokenmill::exchange
