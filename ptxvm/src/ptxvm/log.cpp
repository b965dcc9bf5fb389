#include "ptxvm/log.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

namespace ptxvm {
namespace {

// Stays open until the process ends; -1 if there is no log. Processes may share it: each line is
// one write at the end of the file.
int file() {
  static const int opened = [] {
    const char* path = std::getenv("PTXVM_LOG");
    if (!path || !*path) return -1;
    const int descriptor = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (descriptor < 0) {
      std::fprintf(stderr, "PTXVM_LOG: must be writable; got '%s'\n", path);
      std::exit(2);
    }
    return descriptor;
  }();
  return opened;
}

// Opened before any kernel runs, so that no event is lost.
[[maybe_unused]] const int opened = file();

}  // namespace

bool has_log() { return file() >= 0; }

void log_event(const std::string& object) {
  if (!has_log()) return;
  const std::string line = object + "\n";
  for (size_t at = 0; at < line.size();) {
    const ssize_t written = write(file(), line.data() + at, line.size() - at);
    if (written < 0 && errno != EINTR) return;
    at += written > 0 ? static_cast<size_t>(written) : 0;
  }
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
