// Memory of one worker for the time of one call. Sizes are counts of floats.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "core/dtype.h"

namespace tokenmill::cpu {

class Workspace {
 public:
  explicit Workspace(int64_t floats)
      : base_(static_cast<float*>(std::aligned_alloc(64, round_up(floats, 16) * 4))), next_(base_) {
    if (!base_) throw std::bad_alloc();
  }
  ~Workspace() { std::free(base_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* take(int64_t floats) {
    float* p = next_;
    next_ += round_up(floats, 16);
    return p;
  }

 private:
  float *base_, *next_;
};

}  // namespace tokenmill::cpu
