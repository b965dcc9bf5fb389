#include "ptxvm/log.h"

#include <cstdio>
#include <cstdlib>

namespace ptxvm {
namespace {

// Open until the process ends. Processes may share it: a line is one write at the end of the file.
std::FILE* file() {
  static std::FILE* const opened = [] {
    const char* path = std::getenv("PTXVM_LOG");
    return path && *path ? std::fopen(path, "ae") : nullptr;
  }();
  return opened;
}

}  // namespace

bool has_log() { return file(); }

void log_event(const std::string& object) {
  if (!file()) return;
  std::fputs((object + "\n").c_str(), file());
  std::fflush(file());
}

std::string quoted(const std::string& text) {
  std::string json = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      json += '\\';
      json += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      json += escaped;
    } else {
      json += c;
    }
  }
  return json + "\"";
}

}  // namespace ptxvm
