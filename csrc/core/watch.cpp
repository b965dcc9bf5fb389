#include "core/watch.h"

#include <cstdlib>
#include <memory>

namespace tokenmill::exchange {
namespace {

constexpr const char* kQuestions[][2] = {
    {"torch._C", "_len_torch_dispatch_stack"},
    {"torch._C", "_len_torch_function_stack"},
    {"torch._C", "_are_functorch_transforms_active"},
    {"torch._C", "_is_any_autocast_enabled"},
    {"torch._C", "_get_tracing_state"},
    {"torch.autograd", "_profiler_enabled"},
};

PyObject* name_in(const char* module, const char* name) {
  PyObject* const imported = PyImport_ImportModule(module);
  PyObject* const found = imported ? PyObject_GetAttrString(imported, name) : nullptr;
  Py_XDECREF(imported);
  return found;
}

// Truth of an answer; releases the reference.
int truth(PyObject* answer) {
  if (!answer) return -1;
  const int known = PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return known;
}

}  // namespace

const Watch* Watch::get() {
  static const Watch* watch = nullptr;
  if (!watch) watch = make();
  return watch;
}

const Watch* Watch::make() {
  auto watch = std::make_unique<Watch>();
  for (auto [module, name] : kQuestions) {
    watch->questions_.push_back(name_in(module, name));
    if (!watch->questions_.back()) return nullptr;
  }
  watch->forward_ad_ = PyImport_ImportModule("torch.autograd.forward_ad");
  watch->level_ = PyUnicode_InternFromString("_current_level");
  watch->grad_mode_ = name_in("torch", "is_grad_enabled");
  watch->tensor_ = name_in("torch", "Tensor");
  watch->requires_grad_ = PyUnicode_InternFromString("requires_grad");
  const bool found = watch->forward_ad_ && watch->level_ && watch->grad_mode_ && watch->tensor_ &&
                     watch->requires_grad_ && PyObject_HasAttr(watch->forward_ad_, watch->level_);
  if (!found && !PyErr_Occurred())
    PyErr_SetString(PyExc_AttributeError, "torch.autograd.forward_ad has no _current_level");
  return found ? watch.release() : nullptr;
}

int Watch::any() const {
  for (PyObject* question : questions_)
    if (const int answer = truth(PyObject_CallNoArgs(question))) return answer;
  PyObject* const level = PyObject_GetAttr(forward_ad_, level_);
  if (!level) return -1;
  const long now = PyLong_AsLong(level);
  Py_DECREF(level);
  return PyErr_Occurred() ? -1 : now >= 0;
}

int Watch::records(std::span<PyObject* const> values) const {
  const int recording = truth(PyObject_CallNoArgs(grad_mode_));
  if (recording <= 0) return recording;
  auto* const tensor = reinterpret_cast<PyTypeObject*>(tensor_);
  for (PyObject* const value : values) {
    if (!value || !PyObject_TypeCheck(value, tensor)) continue;
    if (const int wanted = truth(PyObject_GetAttr(value, requires_grad_))) return wanted;
  }
  return 0;
}

bool environment_asks() {
  return std::getenv("TOKENMILL_BACKEND") || std::getenv("TOKENMILL_CHECK");
}

}  // namespace tokenmill::exchange
