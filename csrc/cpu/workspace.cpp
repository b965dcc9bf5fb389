#include "cpu/workspace.h"

#include <cstdlib>
#include <new>

#include "core/dtype.h"

namespace tokenmill::cpu {

Workspace::Workspace(int64_t floats)
    : base_(static_cast<float*>(std::aligned_alloc(64, round_up(floats, 16) * 4))), next_(base_) {
  if (!base_) throw std::bad_alloc();
}

Workspace::~Workspace() { std::free(base_); }

float* Workspace::take(int64_t floats) {
  float* p = next_;
  next_ += round_up(floats, 16);
  return p;
}

}  // namespace tokenmill::cpu
