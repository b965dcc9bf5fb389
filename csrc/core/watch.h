// Whether a call may skip torch's dispatcher: it may while nothing records, transforms, casts,
// traces or watches it.
#pragma once
#include <Python.h>

#include <vector>

namespace tokenmill::exchange {

// The questions to torch, looked up once: references are kept. Answers are 1, 0, or -1 with an
// error of Python.
class Watch {
 public:
  // Null, with an error set, if this torch cannot be asked.
  static const Watch* get();

  // Whether a mode, a transform, autocast, forward-mode AD, a trace or a profile wants the call.
  int any() const;
  // Whether gradients are recorded, and a tensor in this tuple wants one. torch's own function for
  // this takes 50 ns for each value, whatever it is.
  int records(PyObject* values) const;

 private:
  static const Watch* make();

  std::vector<PyObject*> questions_;  // answered by 0, False or None if nothing wants the call
  PyObject *forward_ad_, *level_;     // a module, whose variable of this name is -1 outside
  PyObject *grad_mode_, *tensor_, *requires_grad_;
};

// Whether a variable of the environment chooses a backend or asks for checks.
bool environment_asks();

}  // namespace tokenmill::exchange
