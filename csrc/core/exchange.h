// Fast path: operators as Python functions that read torch tensors through the C functions of
// DLPack.
#pragma once
#include <Python.h>

#include <string>

#include "core/door.h"

namespace tokenmill::exchange {

// A library of this package that is already loaded in the process.
const Library& library_of(const std::string& path);

// Returns a new reference to two Python functions; null with an error set. The first takes its
// arguments in schema order or by name and returns a tuple, or NotImplemented if a tensor is not a
// plain torch.Tensor. The second is for plain calls on the native backend of their device: it takes
// all arguments as one tuple and the number of results to make. It returns NotImplemented where the
// first does, for float64 and if a mode, transform or environment variable affects the call; None
// if a gradient is required.
PyObject* functions_of(Operator& op, const Library& library);

}  // namespace tokenmill::exchange
