// Check-mode rules that a kernel broke, when on_fault says to report and continue.
#pragma once
#include <string>

#include "ptxvm/machine.h"

namespace ptxvm {

// Throws a Fault; or counts a report, and prints it if it is the first of this rule at this line.
void broke_rule(Warp&, const Instruction&, int lane, const std::string& rule,
                const std::string& what);

// What is worth a look and breaks no rule: a report of "note: ..." if kernels go on, else nothing.
void note(Warp&, const Instruction&, int lane, const std::string& rule, const std::string& what);

// JSON list in the order of the first reports: kernel, line, rule, report and count of each. Clears
// the list. Reports that remain when the process ends are printed.
std::string take_reports();

}  // namespace ptxvm
