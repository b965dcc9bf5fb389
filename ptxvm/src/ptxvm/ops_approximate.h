// Functions that PTX defines by an error bound, and parts shared with exact forms.
#pragma once
#include <string>

#include "ptxvm/floats.h"
#include "ptxvm/machine.h"

namespace ptxvm {

Handler approximate_division(bool full, bool ftz);

// in.variant holds the rounding mode.
Handler rounded_reciprocal(const std::string& type, Rounding, bool ftz);
Handler rounded_square_root(const std::string& type, Rounding, bool ftz);

}  // namespace ptxvm
