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
#include <vector>

namespace tokenmill {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
}  // namespace tokenmill

// The namespace of the operators is written here and in python/tokenmill/library.py alone.
#define TOKENMILL_LIBRARY(m) STABLE_TORCH_LIBRARY(tokenmill, m)
#define TOKENMILL_IMPL(key, m) STABLE_TORCH_LIBRARY_IMPL(tokenmill, key, m)
