#include "core/exchange.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>

#include "core/check.h"
#include "core/dlpack.h"

namespace tokenmill::exchange {
namespace {

std::pair<ScalarType, bool> scalar_type(dlpack::DataType t) {
  using S = ScalarType;
  const auto of = [&](std::initializer_list<std::pair<int, S>> widths) -> std::pair<S, bool> {
    for (auto [bits, type] : widths)
      if (t.bits == bits && t.lanes == 1) return {type, true};
    return {S::Undefined, false};
  };
  switch (t.code) {
    case dlpack::kInt:
      return of({{8, S::Char}, {16, S::Short}, {32, S::Int}, {64, S::Long}});
    case dlpack::kUInt:
      return of({{8, S::Byte}, {16, S::UInt16}, {32, S::UInt32}, {64, S::UInt64}});
    case dlpack::kFloat:
      return of({{16, S::Half}, {32, S::Float}, {64, S::Double}});
    case dlpack::kBfloat:
      return of({{16, S::BFloat16}});
    case dlpack::kComplex:
      return of({{32, S::ComplexHalf}, {64, S::ComplexFloat}, {128, S::ComplexDouble}});
    case dlpack::kBool:
      return of({{8, S::Bool}});
    case dlpack::kFloat8E4m3fn:
      return of({{8, S::Float8_e4m3fn}});
    case dlpack::kFloat8E4m3fnuz:
      return of({{8, S::Float8_e4m3fnuz}});
    case dlpack::kFloat8E5m2:
      return of({{8, S::Float8_e5m2}});
    case dlpack::kFloat8E5m2fnuz:
      return of({{8, S::Float8_e5m2fnuz}});
    default:
      return {S::Undefined, false};
  }
}

// What operators allocate.
dlpack::DataType data_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return {dlpack::kFloat, 32, 1};
    case ScalarType::Half:
      return {dlpack::kFloat, 16, 1};
    case ScalarType::BFloat16:
      return {dlpack::kBfloat, 16, 1};
    case ScalarType::Int:
      return {dlpack::kInt, 32, 1};
    case ScalarType::Long:
      return {dlpack::kInt, 64, 1};
    case ScalarType::Byte:
      return {dlpack::kUInt, 8, 1};
    case ScalarType::Bool:
      return {dlpack::kBool, 8, 1};
    default:
      throw std::runtime_error("tokenmill: no results of this dtype are made");
  }
}

// A type of arrays that has the table.
class Producer : public Framework {
 public:
  Producer(const dlpack::ExchangeApi* api, bool emulated) : api_(api), emulated_(emulated) {}

  Array empty(Sizes sizes, ScalarType dtype, bool on_gpu, int32_t device) const override {
    dlpack::Tensor wanted{};
    wanted.device = {on_gpu ? dlpack::kCuda : dlpack::kCpu, on_gpu ? device : 0};
    wanted.ndim = static_cast<int32_t>(sizes.size());
    wanted.dtype = data_type(dtype);
    wanted.shape = const_cast<int64_t*>(sizes.data());
    dlpack::ManagedTensor* made = nullptr;
    std::string error;
    api_->allocate(&wanted, &made, &error, [](void* text, const char*, const char* message) {
      *static_cast<std::string*>(text) = message;
    });
    if (!made) throw std::runtime_error(error);
    Array array;
    array.owner = std::make_shared<Owned>(made);
    set(array, made->tensor, dtype);
    return array;
  }

  void* stream(int32_t device) const override {
    void* stream = nullptr;
    if (api_->current_stream(dlpack::kCuda, device, &stream) != 0)
      throw std::runtime_error("tokenmill: no current CUDA stream");
    return stream;
  }

  // false: not memory that operators can use.
  bool view(PyObject* object, View& v) const {
    dlpack::Tensor t;
    if (api_->borrow_from_object(object, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    const auto [dtype, known] = scalar_type(t.dtype);
    if (!known || (!t.strides && t.ndim > 0)) return false;
    if (t.device.type != dlpack::kCpu && t.device.type != dlpack::kCuda) return false;
    set(v, t, dtype);
    return true;
  }

  // A new reference to what an operator has made, and gives away; null with an error set.
  PyObject* object(const Array& array) const {
    auto* const owned = static_cast<Owned*>(array.owner.get());
    void* made = nullptr;
    if (api_->managed_to_object(std::exchange(owned->tensor, nullptr), &made) != 0) return nullptr;
    return static_cast<PyObject*>(made);
  }

 private:
  struct Owned {
    explicit Owned(dlpack::ManagedTensor* tensor) : tensor(tensor) {}
    ~Owned() {
      if (tensor && tensor->deleter) tensor->deleter(tensor);
    }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    dlpack::ManagedTensor* tensor;
  };

  void set(View& v, const dlpack::Tensor& t, ScalarType dtype) const {
    v.pointer = static_cast<char*>(t.data) + t.byte_offset;
    v.sizes = {t.shape, static_cast<size_t>(t.ndim)};
    v.strides = {t.strides, static_cast<size_t>(t.ndim)};
    v.dtype = dtype;
    v.element_bytes = t.dtype.bits / 8;
    v.on_gpu = t.device.type == dlpack::kCuda;
    v.is_cuda = emulated_ || v.on_gpu;
    v.device = v.on_gpu ? t.device.id : -1;
    v.framework = this;
  }

  const dlpack::ExchangeApi* api_;
  bool emulated_;
};

// One operator as a function. Lives as long as the process.
struct Function {
  Function(Operator& op, const Library& library);
  PyObject* call(PyObject* const* given, size_t positional, PyObject* names);

  Operator& op;
  const Schema& schema;
  const Library& library;
  std::vector<PyObject*> names;  // interned
  PyMethodDef method;
  // The last type that was seen, and what makes its arrays.
  PyTypeObject* type = nullptr;
  const Producer* producer = nullptr;

 private:
  const Producer* producer_of(PyTypeObject* of);
  bool place(PyObject* name, PyObject* value, PyObject** slots);
  bool convert(const SchemaArgument& a, PyObject* value, Argument& argument);
};

// Null: arrays of this type do not come through this door. A subclass may have changed what its
// arrays mean, so the type itself must hold the table.
const Producer* Function::producer_of(PyTypeObject* of) {
  if (of == type) return producer;
  static PyObject* const attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  static std::vector<std::pair<const dlpack::ExchangeApi*, const Producer*>> known[2];
  PyObject* const capsule = of->tp_dict ? PyDict_GetItem(of->tp_dict, attribute) : nullptr;
  if (!capsule || !PyCapsule_IsValid(capsule, dlpack::kExchangeApi)) return nullptr;
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kExchangeApi));
  while (api && api->version.major > 1) api = api->previous;
  if (!api || !api->borrow_from_object) return nullptr;
  auto& here = known[library.emulated];
  auto found =
      std::find_if(here.begin(), here.end(), [&](const auto& entry) { return entry.first == api; });
  if (found == here.end()) found = here.insert(found, {api, new Producer(api, library.emulated)});
  Py_INCREF(of);
  Py_XDECREF(type);
  type = of;
  producer = found->second;
  return producer;
}

bool wrong(const char* op, const std::string& name, const char* rule, PyObject* value) {
  PyErr_Clear();
  PyErr_Format(PyExc_RuntimeError, "tokenmill.%s: %s: %s; got %R", op, name.c_str(), rule, value);
  return false;
}

bool Function::convert(const SchemaArgument& a, PyObject* value, Argument& argument) {
  if (value == Py_None) {
    argument.given = false;
    return a.optional || wrong(op.name, a.name, "must be given", value);
  }
  switch (a.kind) {
    case Kind::integer:
      argument.integer = PyLong_CheckExact(value) ? PyLong_AsLongLong(value)
                                                  : (PyErr_SetNone(PyExc_TypeError), -1);
      return !(argument.integer == -1 && PyErr_Occurred()) ||
             wrong(op.name, a.name, "must be an integer of 64 bits", value);
    case Kind::number:
      if (!PyFloat_Check(value) && !PyLong_CheckExact(value))
        return wrong(op.name, a.name, "must be a number", value);
      argument.number = PyFloat_AsDouble(value);
      return !PyErr_Occurred() || wrong(op.name, a.name, "must fit a float", value);
    case Kind::boolean:
      argument.boolean = value == Py_True;
      return PyBool_Check(value) || wrong(op.name, a.name, "must be a bool", value);
    default: {
      Py_ssize_t length = 0;
      const char* text = PyUnicode_Check(value) ? PyUnicode_AsUTF8AndSize(value, &length) : nullptr;
      if (!text) return wrong(op.name, a.name, "must be a string", value);
      argument.text = {text, static_cast<size_t>(length)};
      return true;
    }
  }
}

bool Function::place(PyObject* name, PyObject* value, PyObject** slots) {
  size_t i = std::find(names.begin(), names.end(), name) - names.begin();
  for (size_t j = 0; i == names.size() && j < names.size(); ++j)
    if (PyUnicode_Compare(name, names[j]) == 0) i = j;
  if (i == names.size()) {
    PyErr_Format(PyExc_TypeError, "tokenmill.%s: there is no argument %R", op.name, name);
    return false;
  }
  if (slots[i]) {
    PyErr_Format(PyExc_TypeError, "tokenmill.%s: %R is given twice", op.name, name);
    return false;
  }
  slots[i] = value;
  return true;
}

PyObject* Function::call(PyObject* const* given, size_t positional, PyObject* keywords) {
  const size_t count = schema.arguments.size();
  if (positional > count)
    return PyErr_Format(PyExc_TypeError, "tokenmill.%s: takes %zu arguments; got %zu", op.name,
                        count, positional);
  PyObject* slots[kMostArguments] = {};
  std::copy_n(given, positional, slots);
  const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
  for (Py_ssize_t i = 0; i < named; ++i)
    if (!place(PyTuple_GET_ITEM(keywords, i), given[positional + i], slots)) return nullptr;

  Argument arguments[kMostArguments];
  const Producer* from = nullptr;
  for (size_t i = 0; i < count; ++i) {
    const SchemaArgument& a = schema.arguments[i];
    PyObject* const value = slots[i];
    if (!value) {
      if (!a.has_default)
        return PyErr_Format(PyExc_TypeError, "tokenmill.%s: %s must be given", op.name,
                            a.name.c_str());
      arguments[i] = a.value;
    } else if (a.kind != Kind::array) {
      if (!convert(a, value, arguments[i])) return nullptr;
    } else if (value == Py_None) {
      arguments[i].given = false;
      if (!a.optional) return wrong(op.name, a.name, "must be a tensor", value), nullptr;
    } else {
      const Producer* const made_by = producer_of(Py_TYPE(value));
      if (!made_by || (from && made_by != from) || !made_by->view(value, arguments[i].view) ||
          (arguments[i].view.on_gpu && !library.cuda))
        Py_RETURN_NOTIMPLEMENTED;
      from = made_by;
    }
  }
  if (!from) Py_RETURN_NOTIMPLEMENTED;

  Array results[kMostResults];
  std::string error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    op.call(arguments, results);
  } catch (const std::exception& e) {
    error = e.what();
    if (error.empty()) error = "tokenmill: unknown error";
  }
  Py_END_ALLOW_THREADS;
  if (!error.empty()) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  const size_t outputs = schema.results.size();
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(outputs));
  for (size_t i = 0; tuple && i < outputs; ++i) {
    PyObject* const made = from->object(results[i]);
    if (!made) {
      Py_DECREF(tuple);
      return nullptr;
    }
    PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), made);
  }
  return tuple;
}

constexpr const char* kCapsule = "tokenmill.operator";

PyObject* call_function(PyObject* self, PyObject* const* given, Py_ssize_t count,
                        PyObject* keywords) {
  auto* const function = static_cast<Function*>(PyCapsule_GetPointer(self, kCapsule));
  return function->call(given, static_cast<size_t>(count), keywords);
}

Function::Function(Operator& op, const Library& library)
    : op(op), schema(*op.found.load()), library(library) {
  for (const SchemaArgument& a : schema.arguments)
    names.push_back(PyUnicode_InternFromString(a.name.c_str()));
  method = {op.name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_function)),
            METH_FASTCALL | METH_KEYWORDS, nullptr};
}

}  // namespace

const Library& library_of(const std::string& path) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!handle) throw std::runtime_error("tokenmill: " + path + " is not loaded");
  using Get = const Library* (*)();
  const auto get = reinterpret_cast<Get>(dlsym(handle, "tokenmill_library"));
  if (!get) throw std::runtime_error("tokenmill: " + path + " has no operators");
  return *get();
}

PyObject* function_of(Operator& op, const Library& library) {
  auto* const function = new Function(op, library);
  PyObject* const self = PyCapsule_New(function, kCapsule, nullptr);
  return self ? PyCFunction_New(&function->method, self) : nullptr;
}

}  // namespace tokenmill::exchange
