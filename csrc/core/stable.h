// torch's stable ABI (torch >= 2.10), and the namespace of the operators, which is spelled only
// here and in python/tokenmill/_call/library.py. TOKENMILL_EMULATED builds a second library of the
// same operators, in which the CUDA code serves CPU tensors: its kernels run on the PTX machine
// (ptxvm).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(TOKENMILL_EMULATED)
#define TOKENMILL_NAMESPACE tokenmill_emulated
#elif defined(TORCH_EXTENSION_NAME)  // built by kernel-builder (ci/hub)
#define TOKENMILL_NAMESPACE TORCH_EXTENSION_NAME
#else
#define TOKENMILL_NAMESPACE tokenmill
#endif

// The indirection expands the macro argument.
#define TOKENMILL_DEFINE(space, m) STABLE_TORCH_LIBRARY(space, m)
#define TOKENMILL_IMPLEMENT(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
#define TOKENMILL_LIBRARY(m) TOKENMILL_DEFINE(TOKENMILL_NAMESPACE, m)
#define TOKENMILL_IMPL(key, m) TOKENMILL_IMPLEMENT(TOKENMILL_NAMESPACE, key, m)
