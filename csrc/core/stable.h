// The one door to torch: its stable ABI (torch >= 2.10), and the names we use of it.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/emulated.h"

namespace tokenmill {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
}  // namespace tokenmill

// The namespace of the operators is written here and in python/tokenmill/library.py alone. Compiled
// with TOKENMILL_EMULATED, the same files make a second library in which what is registered for
// CUDA serves CPU tensors: its kernels run on the PTX machine (csrc/ptxvm).
#if defined(TOKENMILL_EMULATED)
#define TOKENMILL_LIBRARY(m) STABLE_TORCH_LIBRARY(tokenmill_emulated, m)
#define TOKENMILL_IMPL(key, m) TOKENMILL_IMPL_##key(m)
#define TOKENMILL_IMPL_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(tokenmill_emulated, CPU, m)
#define TOKENMILL_IMPL_CPU(m)                   \
  [[maybe_unused]] static void C10_CONCATENATE( \
      not_registered_, __COUNTER__)(torch::stable::detail::StableLibrary & m)
#define TOKENMILL_IMPL_CompositeExplicitAutograd(m) \
  STABLE_TORCH_LIBRARY_IMPL(tokenmill_emulated, CompositeExplicitAutograd, m)
#else
#define TOKENMILL_LIBRARY(m) STABLE_TORCH_LIBRARY(tokenmill, m)
#define TOKENMILL_IMPL(key, m) STABLE_TORCH_LIBRARY_IMPL(tokenmill, key, m)
#endif
