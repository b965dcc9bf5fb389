// How the function of an operator is handed to torch.
#pragma once
#include <algorithm>
#include <string>
#include <string_view>

#include "core/check.h"
#include "core/emulated.h"

namespace tokenmill {

// In library.cpp, from the schema.
std::string argument_name(std::string_view op, size_t index);

// A string as a template argument.
template <size_t n>
struct Name {
  consteval Name(const char (&literal)[n]) { std::copy_n(literal, n, text); }
  char text[n];
};

// torch passes None for a tensor that must be there as one that is not defined.
template <typename Argument>
void check_given(const char* op, size_t index, const Argument& argument) {
  if constexpr (std::is_same_v<Argument, Tensor>)
    if (!argument.defined()) [[unlikely]]
      fail(op, argument_name(op, index), "must be a tensor", "None");
}

template <auto function, Name op>
struct Boxed;

template <typename Result, typename... Args, Result (*function)(Args...), Name op>
struct Boxed<function, op> {
  static Result call(Args... args) {
    [[maybe_unused]] emulated::Frame frame;  // what this call notes lasts as long as the call
    size_t index = 0;
    (check_given(op.text, index++, args), ...);
    return function(std::move(args)...);
  }
};

}  // namespace tokenmill

// The function has the name of its operator.
#define TOKENMILL_BOX(function) TORCH_BOX((&tokenmill::Boxed<&function, #function>::call))
