// Rules of check mode that a kernel broke, where the option on_fault says to report and go on.
#pragma once
#include <string>

#include "ptxvm/machine.h"

namespace ptxvm {

// A Fault; or a report, printed if it is the first of this rule at this line, and counted.
void broke_rule(Warp&, const Instruction&, int lane, const std::string& rule,
                const std::string& what);

// A list of JSON, in the order of the first reports: kernel, line, rule, report and count of each.
// Forgets them. What is left when the process ends is printed.
std::string take_reports();

}  // namespace ptxvm
