// Event log of a process, for another process to read: one JSON object per event and line, appended
// at once to the file that PTXVM_LOG names.
//
//   {"launch": {"kernel": ..., "grid": [...], "block": [...], ...}}      counters too, if counted
//   {"broken": {"kernel": ..., "line": ..., "rule": ..., "report": ...}} the first time at a line
//   {"error": code, "report": ..., "finding": {...} or null}             of a call that failed
#pragma once
#include <string>

namespace ptxvm {

bool has_log();
void log_event(const std::string& object);

// The text as a JSON string.
std::string quoted(const std::string& text);

}  // namespace ptxvm
