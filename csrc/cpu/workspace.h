// Scratch memory of one worker during one call. Sizes are counts of floats.
#pragma once
#include <cstdint>

namespace tokenmill::cpu {

class Workspace {
 public:
  explicit Workspace(int64_t floats);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* take(int64_t floats);  // 64-byte aligned

 private:
  float *base_, *next_;
};

}  // namespace tokenmill::cpu
