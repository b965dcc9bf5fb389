// Rules that a kernel broke: reports, which go on or end the launch as on_fault says.
#pragma once
#include <string>

#include "ptxvm/machine.h"

namespace ptxvm {

// Place of an instruction. `part`: first line of the code around it that has neither branches nor
// instructions that order accesses, so that one barrier before or after it serves all of its lines.
struct Position {
  uint32_t line = 0, part = 0;  // of the PTX; 0: none
  std::string file;             // of the source, with -lineinfo
  uint32_t source_line = 0;

  std::string members() const;  // of an object of JSON
};

struct Finding {
  std::string kernel, name;  // mangled and demangled
  std::string rule, report;
  Position at;
  Position cause;  // an earlier access, or where a value was lost
  uint64_t count = 1;

  std::string json() const;
};

// Ends the launch of a kernel that broke a rule.
struct KernelFault : Fault {
  explicit KernelFault(const Finding& of) : Fault(of.report), finding(of) {}
  Finding finding;
};

// `at` may be null. `report` is the whole text.
Finding finding_of(const Kernel&, const Instruction* at, const std::string& rule,
                   const std::string& report);
// With a report that names kernel, line, instruction, `what` and the lane.
Finding finding_at(const Warp&, const Instruction&, int lane, const std::string& rule,
                   const std::string& what);

// Throws a KernelFault; or counts a finding, and prints it if it is the first of this rule and
// cause at this line.
void broke_rule(Warp&, const Instruction&, int lane, const std::string& rule,
                const std::string& what, const Instruction* cause = nullptr);

// What is worth a look and breaks no rule: a finding of "note: ..." if kernels go on, else nothing.
void note(Warp&, const Instruction&, int lane, const std::string& rule, const std::string& what);

// JSON list of the findings in the order of the first reports. Clears the list. Reports that remain
// when the process ends are printed.
std::string take_reports();

// Words of reports: "block (0, 1, 0)"; "0x0000ffff"; " line 12 (file.cu:3): st.shared.b32"; an
// instruction with long vectors of registers cut short; "name+0x10" for an address in shared
// memory, or nothing.
std::string place_of(const Block&);
std::string in_hex(Mask);
std::string at_line(const Warp&, const Instruction&);
std::string short_text(const Instruction&);
std::string shared_symbol(const Kernel&, uint32_t offset);

}  // namespace ptxvm
