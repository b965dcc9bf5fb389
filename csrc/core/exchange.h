// The short door: operators as functions of Python, which see torch's tensors through the C
// functions of DLPack.
#pragma once
#include <Python.h>

#include <string>

#include "core/door.h"

namespace tokenmill::exchange {

// A library of this package that the process has loaded.
const Library& library_of(const std::string& path);

// A new reference to two functions of Python; null with an error set. The first takes its arguments
// in the order of the schema or by name and returns a tuple, or NotImplemented: a tensor is not an
// ordinary one. The second is for plain calls on the native backend of their device: it takes all
// arguments as one tuple and how many of the results to make. It returns NotImplemented where the
// first does, for float64 and if anything else is asked of the call, None if a gradient is.
PyObject* functions_of(Operator& op, const Library& library);

}  // namespace tokenmill::exchange
