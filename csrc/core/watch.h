// Decides if a call may skip torch's dispatcher: only while nothing records, transforms, casts,
// traces or watches it.
#pragma once
#include <Python.h>

#include <span>
#include <vector>

namespace tokenmill::exchange {

// Functions of torch to ask, looked up once; references are kept. Answers are 1, 0, or -1 with a
// Python error set.
class Watch {
 public:
  // Null, with an error set, if this torch lacks one of the functions.
  static const Watch* get();

  // 1 if a mode, a transform, autocast, forward-mode AD, a trace or a profiler affects the call.
  int any() const;
  // 1 if gradients are recorded and a tensor among the values, which may be null, requires one.
  // torch's own function for this takes 50 ns per value, of any type.
  int records(std::span<PyObject* const> values) const;

 private:
  static const Watch* make();

  std::vector<PyObject*> questions_;  // return 0, False or None if nothing affects the call
  // a module, whose variable of this name is -1 outside of forward-mode AD
  PyObject *forward_ad_, *level_;
  PyObject *grad_mode_, *tensor_, *requires_grad_;
};

// True if an environment variable chooses a backend or requests checks.
bool environment_asks();

}  // namespace tokenmill::exchange
