#include "core/exchange.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <stdexcept>

#include "core/check.h"
#include "core/dlpack.h"
#include "core/watch.h"

namespace tokenmill::exchange {
namespace {

// Undefined: no argument may have this dtype.
ScalarType scalar_type(dlpack::DataType t) {
  using S = ScalarType;
  const auto of = [&](std::initializer_list<std::pair<int, S>> widths) {
    for (auto [bits, type] : widths)
      if (t.bits == bits && t.lanes == 1) return type;
    return S::Undefined;
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
      return S::Undefined;
  }
}

// A dtype that operators allocate, in DLPack and in Python.
struct ResultType {
  ScalarType scalar;
  dlpack::DataType dlpack;
  const char* name;
};

constexpr ResultType kResultTypes[] = {
    {ScalarType::Float, {dlpack::kFloat, 32, 1}, "float32"},
    {ScalarType::Half, {dlpack::kFloat, 16, 1}, "float16"},
    {ScalarType::BFloat16, {dlpack::kBfloat, 16, 1}, "bfloat16"},
    {ScalarType::Int, {dlpack::kInt, 32, 1}, "int32"},
    {ScalarType::Long, {dlpack::kInt, 64, 1}, "int64"},
    {ScalarType::Byte, {dlpack::kUInt, 8, 1}, "uint8"},
    {ScalarType::Bool, {dlpack::kBool, 8, 1}, "bool"},
};

// Index in kResultTypes.
size_t result_type(ScalarType type) {
  for (size_t i = 0; i < std::size(kResultTypes); ++i)
    if (kResultTypes[i].scalar == type) return i;
  throw std::runtime_error("tokenmill: no results of this dtype are made");
}

// Objects of torch that the functions need, looked up once; references are kept.
struct Torch {
  // Null, with an error set, if torch is missing or has no exchange table.
  static const Torch* get() {
    static const Torch* torch = nullptr;
    if (!torch) torch = make();
    return torch;
  }

  const Watch* watch = nullptr;
  PyTypeObject* tensor = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* is_neg = nullptr;  // torch.Tensor.is_neg
  PyObject *new_empty = nullptr, *dtype_keyword = nullptr;
  std::vector<PyObject*> dtypes;  // of kResultTypes

 private:
  static const Torch* make() {
    auto torch = std::make_unique<Torch>();
    torch->watch = Watch::get();
    if (!torch->watch) return nullptr;
    PyObject* const module = PyImport_ImportModule("torch");
    if (!module) return nullptr;
    torch->tensor = reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(module, "Tensor"));
    if (!torch->tensor) return nullptr;
    auto* const type = reinterpret_cast<PyObject*>(torch->tensor);
    PyObject* const capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    if (!capsule) return nullptr;
    torch->api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule, dlpack::kExchangeApi));
    while (torch->api && torch->api->version.major > 1) torch->api = torch->api->previous;
    if (!torch->api || !torch->api->borrow_from_object) {
      PyErr_SetString(PyExc_ImportError, "tokenmill: torch has no table of DLPack 1.x");
      return nullptr;
    }
    torch->is_neg = PyObject_GetAttrString(type, "is_neg");
    torch->new_empty = PyUnicode_InternFromString("new_empty");
    torch->dtype_keyword = Py_BuildValue("(s)", "dtype");
    for (const ResultType& type : kResultTypes)
      torch->dtypes.push_back(PyObject_GetAttrString(module, type.name));
    return PyErr_Occurred() ? nullptr : torch.release();
  }
};

// Owner of a result: a DLPack array, or a Python tensor. Empty ones are made when they are
// returned, because most are not.
struct Owner {
  Owner() = default;
  Owner(const Owner&) = delete;
  Owner& operator=(const Owner&) = delete;
  ~Owner() {
    if (managed && managed->deleter) managed->deleter(managed);
    if (!object) return;
    const PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(object);
    PyGILState_Release(state);
  }
  dlpack::ManagedTensor* managed = nullptr;
  PyObject* object = nullptr;
  std::vector<int64_t> sizes, strides;  // of an empty result
};

// Tensors of one call.
class Call : public Framework {
 public:
  Call(const Torch& torch, bool emulated) : torch_(torch), emulated_(emulated) {}

  // On a GPU torch itself makes the results: memory that came through DLPack would not know of
  // other streams (Tensor.record_stream). On a CPU that takes ten times as long.
  Array empty(Sizes sizes, ScalarType dtype, bool on_gpu, int32_t) const override {
    Array array;
    const auto owner = std::make_shared<Owner>();
    if (on_gpu)
      make(sizes, dtype, *owner, array);
    else if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end())
      postpone(sizes, dtype, *owner, array);
    else if (const std::string error = allocate(sizes, dtype, *owner); owner->managed)
      set(owner->managed->tensor, array);
    else
      throw std::runtime_error(error);
    array.owner = owner;
    return array;
  }

  // Returns a new reference to an array made by an operator, and gives it away; null with an error
  // set.
  PyObject* object(const Array& array) const {
    auto* const owner = static_cast<Owner*>(array.owner.get());
    if (owner->object) return std::exchange(owner->object, nullptr);
    if (!owner->managed) {
      const std::string error = allocate(array.sizes, array.dtype, *owner);
      if (!owner->managed) return PyErr_SetString(PyExc_RuntimeError, error.c_str()), nullptr;
    }
    void* made = nullptr;
    const int error = torch_.api->managed_to_object(std::exchange(owner->managed, nullptr), &made);
    return error ? nullptr : static_cast<PyObject*>(made);
  }

  void* stream(int32_t device) const override {
    void* stream = nullptr;
    if (torch_.api->current_stream(dlpack::kCuda, device, &stream) != 0)
      throw std::runtime_error("tokenmill: no current CUDA stream");
    return stream;
  }

  // False: not a plain tensor with memory. A subclass may have changed the meaning of its memory.
  bool view(PyObject* object, View& v) {
    if (Py_TYPE(object) != torch_.tensor) return false;
    PyObject* const negated = PyObject_CallOneArg(torch_.is_neg, object);  // lazy negation
    Py_XDECREF(negated);
    if (negated != Py_False || !set(object, v)) {
      PyErr_Clear();
      return false;
    }
    if (!like_) like_ = object;
    return v.pointer || v.numel() == 0;  // torch's ZeroTensor has no memory
  }

 private:
  bool set(PyObject* object, View& v) const {
    dlpack::Tensor t;
    return torch_.api->borrow_from_object(object, &t) == 0 && set(t, v);
  }

  bool set(const dlpack::Tensor& t, View& v) const {
    const ScalarType dtype = scalar_type(t.dtype);
    if (dtype == ScalarType::Undefined || (!t.strides && t.ndim > 0)) return false;
    if (t.device.type != dlpack::kCpu && t.device.type != dlpack::kCuda) return false;
    v.pointer = static_cast<char*>(t.data) + t.byte_offset;
    v.sizes = {t.shape, static_cast<size_t>(t.ndim)};
    v.strides = {t.strides, static_cast<size_t>(t.ndim)};
    v.dtype = dtype;
    v.element_bytes = t.dtype.bits / 8;
    v.on_gpu = t.device.type == dlpack::kCuda;
    v.is_cuda = emulated_ || v.on_gpu;
    v.device = v.on_gpu ? t.device.id : -1;
    v.framework = this;
    return true;
  }

  static dlpack::Tensor description(Sizes sizes, ScalarType dtype) {
    dlpack::Tensor t{};
    t.device = {dlpack::kCpu, 0};
    t.ndim = static_cast<int32_t>(sizes.size());
    t.dtype = kResultTypes[result_type(dtype)].dlpack;
    t.shape = const_cast<int64_t*>(sizes.data());
    return t;
  }

  // Returns an error message, if the owner has nothing afterwards.
  std::string allocate(Sizes sizes, ScalarType dtype, Owner& owner) const {
    dlpack::Tensor wanted = description(sizes, dtype);
    std::string error;
    torch_.api->allocate(&wanted, &owner.managed, &error,
                         [](void* text, const char*, const char* message) {
                           *static_cast<std::string*>(text) = message;
                         });
    return error;
  }

  void postpone(Sizes sizes, ScalarType dtype, Owner& owner, Array& array) const {
    owner.sizes = sizes;
    owner.strides.resize(sizes.size());
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1))
      owner.strides[i] = step;
    dlpack::Tensor nothing = description({owner.sizes.data(), sizes.size()}, dtype);
    nothing.strides = owner.strides.data();
    set(nothing, array);
  }

  void make(Sizes sizes, ScalarType dtype, Owner& owner, Array& array) const {
    PyObject* const of = torch_.dtypes[result_type(dtype)];
    const PyGILState_STATE state = PyGILState_Ensure();
    PyObject* const shape = PyTuple_New(static_cast<Py_ssize_t>(sizes.size()));
    for (size_t i = 0; i < sizes.size(); ++i)
      PyTuple_SET_ITEM(shape, static_cast<Py_ssize_t>(i), PyLong_FromLongLong(sizes[i]));
    PyObject* const given[] = {like_, shape, of};
    owner.object = PyObject_VectorcallMethod(torch_.new_empty, given, 2, torch_.dtype_keyword);
    Py_DECREF(shape);
    const bool good = owner.object && set(owner.object, array);
    const std::string error = good ? "" : message();
    PyGILState_Release(state);
    if (!good) throw std::runtime_error(error);
  }

  // Message of the Python error that is set; clears it.
  static std::string message() {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject* const text = value ? PyObject_Str(value) : nullptr;
    const char* const letters = text ? PyUnicode_AsUTF8(text) : nullptr;
    std::string message = letters ? letters : "tokenmill: a result was not made";
    for (PyObject* object : {type, value, trace, text}) Py_XDECREF(object);
    return message;
  }

  const Torch& torch_;
  bool emulated_;
  PyObject* like_ = nullptr;  // first tensor of the call, on whose device results are made
};

// One operator as two Python functions. Lives as long as the process.
struct Function {
  Function(Operator& op, const Library& library, const Torch& torch);
  PyObject* call(PyObject* const* given, size_t positional, PyObject* names);
  PyObject* call_plain(PyObject* values, PyObject* named, size_t wanted, PyObject* record);

  Operator& op;
  const Schema& schema;
  const Library& library;
  const Torch& torch;
  std::vector<PyObject*> names;  // interned
  PyMethodDef method, plain_method;
  PyObject* function = nullptr;  // of `call`

 private:
  // slots: arguments in schema order, null where not given. Makes only the first `wanted` results.
  // record: null, or for a plain call what call_plain takes.
  PyObject* run(PyObject* const* slots, size_t wanted, PyObject* record) const;
  PyObject* recorded(PyObject* const* slots, size_t wanted, PyObject* record) const;
  bool place(PyObject* name, PyObject* value, PyObject** slots) const;
  bool convert(const SchemaArgument& a, PyObject* value, Argument& argument) const;
};

bool wrong(const char* op, const std::string& name, const char* rule, PyObject* value) {
  PyErr_Clear();
  PyErr_Format(PyExc_RuntimeError, "tokenmill.%s: %s: %s; got %R", op, name.c_str(), rule, value);
  return false;
}

bool Function::convert(const SchemaArgument& a, PyObject* value, Argument& argument) const {
  if (value == Py_None) {
    argument.given = false;
    const char* const rule = a.kind == Kind::array ? "must be a tensor" : "must be given";
    return a.optional || wrong(op.name, a.name, rule, value);
  }
  switch (a.kind) {
    case Kind::integer:
      argument.integer = PyLong_CheckExact(value) ? PyLong_AsLongLong(value) : -1;
      if (PyLong_CheckExact(value) && !PyErr_Occurred()) return true;
      return wrong(op.name, a.name, "must be an integer of 64 bits", value);
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

bool Function::place(PyObject* name, PyObject* value, PyObject** slots) const {
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
  PyObject* slots[kMaxArguments] = {};
  std::copy_n(given, positional, slots);
  const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
  for (Py_ssize_t i = 0; i < named; ++i)
    if (!place(PyTuple_GET_ITEM(keywords, i), given[positional + i], slots)) return nullptr;
  PyObject* const results = run(slots, schema.results.size(), nullptr);
  if (!results || results == Py_NotImplemented || schema.results.size() > 1) return results;
  PyObject* const only = schema.results.empty() ? Py_None : PyTuple_GET_ITEM(results, 0);
  Py_INCREF(only);
  Py_DECREF(results);
  return only;
}

PyObject* Function::call_plain(PyObject* values, PyObject* named, size_t wanted, PyObject* record) {
  const size_t count = schema.arguments.size();
  if (!PyTuple_CheckExact(values) || static_cast<size_t>(PyTuple_GET_SIZE(values)) > count ||
      !PyDict_CheckExact(named))
    return PyErr_Format(PyExc_TypeError,
                        "tokenmill.%s: takes a tuple of at most %zu arguments, and a dict", op.name,
                        count);
  const int watched = torch.watch->any();
  if (watched < 0) return nullptr;
  if (watched || environment_asks()) Py_RETURN_NOTIMPLEMENTED;
  PyObject* slots[kMaxArguments] = {};
  std::copy_n(&PyTuple_GET_ITEM(values, 0), PyTuple_GET_SIZE(values), slots);
  PyObject *name, *value;
  for (Py_ssize_t next = 0; PyDict_Next(named, &next, &name, &value);)
    if (!place(name, value, slots)) return nullptr;
  return run(slots, wanted, record);
}

// record(function, wanted, names, options, *tensors): the given tensors with their names, and the
// other given arguments by name.
PyObject* Function::recorded(PyObject* const* slots, size_t wanted, PyObject* record) const {
  if (record == Py_None) Py_RETURN_NONE;
  PyObject* const options = PyDict_New();
  if (!options) return nullptr;
  PyObject* tensors[kMaxArguments];
  PyObject* given[4 + kMaxArguments] = {function, PyLong_FromSize_t(wanted), nullptr, options};
  size_t count = 0;
  bool good = given[1];
  for (size_t i = 0; good && i < schema.arguments.size(); ++i) {
    if (!slots[i] || slots[i] == Py_None) continue;
    if (schema.arguments[i].kind == Kind::array) {
      tensors[count] = names[i];
      given[4 + count++] = slots[i];
    } else {
      good = PyDict_SetItem(options, names[i], slots[i]) == 0;
    }
  }
  given[2] = good ? PyTuple_New(static_cast<Py_ssize_t>(count)) : nullptr;
  for (size_t i = 0; given[2] && i < count; ++i) {
    Py_INCREF(tensors[i]);
    PyTuple_SET_ITEM(given[2], static_cast<Py_ssize_t>(i), tensors[i]);
  }
  PyObject* results = given[2] ? PyObject_Vectorcall(record, given, 4 + count, nullptr) : nullptr;
  for (PyObject* made : {given[1], given[2], options}) Py_XDECREF(made);
  if (!results || PyTuple_Check(results)) return results;
  PyObject* const tuple = PyTuple_Pack(1, results);
  Py_DECREF(results);
  return tuple;
}

PyObject* Function::run(PyObject* const* slots, size_t wanted, PyObject* record) const {
  const size_t count = schema.arguments.size();
  // Not initialised: to clear all 5 KB would take as long as the rest.
  alignas(Argument) std::byte room[kMaxArguments * sizeof(Argument)];
  auto* const arguments = reinterpret_cast<Argument*>(room);
  Call call(torch, library.emulated);
  bool wide = false;  // some tensor is float64, which only the reference takes
  for (size_t i = 0; i < count; ++i) {
    const SchemaArgument& a = schema.arguments[i];
    PyObject* const value = slots[i];
    Argument& argument = *std::construct_at(arguments + i);
    if (!value && a.has_default) {
      argument = a.value;
    } else if (!value) {
      if (record) Py_RETURN_NOTIMPLEMENTED;
      return PyErr_Format(PyExc_TypeError, "tokenmill.%s: %s must be given", op.name,
                          a.name.c_str());
    } else if (a.kind != Kind::array || value == Py_None) {
      if (convert(a, value, argument)) continue;
      if (!record) return nullptr;
      PyErr_Clear();
      Py_RETURN_NOTIMPLEMENTED;
    } else {
      if (!call.view(value, argument.view) || (argument.view.on_gpu && !library.cuda))
        Py_RETURN_NOTIMPLEMENTED;
      wide |= argument.view.dtype == ScalarType::Double;
    }
  }
  if (record) {
    if (wide) Py_RETURN_NOTIMPLEMENTED;
    const int records = torch.watch->records({slots, count});
    if (records) return records < 0 ? nullptr : recorded(slots, wanted, record);
  }

  const size_t outputs = std::min(wanted, schema.results.size());
  Array results[kMaxResults];
  std::string error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    op.call(schema, arguments, results, outputs);
  } catch (const std::exception& e) {
    error = e.what();
    if (error.empty()) error = "tokenmill: unknown error";
  }
  Py_END_ALLOW_THREADS;
  if (!error.empty()) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(outputs));
  for (size_t i = 0; tuple && i < outputs; ++i) {
    PyObject* const made = call.object(results[i]);
    if (!made) {
      Py_DECREF(tuple);
      return nullptr;
    }
    PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), made);
  }
  return tuple;
}

constexpr const char* kCapsule = "tokenmill.operator";

Function* function_in(PyObject* capsule) {
  return static_cast<Function*>(PyCapsule_GetPointer(capsule, kCapsule));
}

PyObject* call_function(PyObject* self, PyObject* const* given, Py_ssize_t count,
                        PyObject* keywords) {
  return function_in(self)->call(given, static_cast<size_t>(count), keywords);
}

PyObject* call_plain_function(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  if (count != 4)
    return PyErr_Format(PyExc_TypeError,
                        "tokenmill.%s: takes arguments by position, by name, a number of results "
                        "and a function that records",
                        function_in(self)->op.name);
  const size_t wanted = PyLong_AsSize_t(given[2]);
  if (wanted == static_cast<size_t>(-1) && PyErr_Occurred()) return nullptr;
  return function_in(self)->call_plain(given[0], given[1], wanted, given[3]);
}

template <typename Method>
PyMethodDef method_of(const char* name, Method* method, int flags) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method)), flags, nullptr};
}

Function::Function(Operator& op, const Library& library, const Torch& torch)
    : op(op), schema(*op.found.load()), library(library), torch(torch) {
  for (const SchemaArgument& a : schema.arguments)
    names.push_back(PyUnicode_InternFromString(a.name.c_str()));
  method = method_of(op.name, call_function, METH_FASTCALL | METH_KEYWORDS);
  plain_method = method_of(op.name, call_plain_function, METH_FASTCALL);
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

PyObject* functions_of(Operator& op, const Library& library) {
  const Torch* const torch = Torch::get();
  if (!torch) return nullptr;
  auto* const function = new Function(op, library, *torch);
  PyObject* const self = PyCapsule_New(function, kCapsule, nullptr);
  if (!self) return nullptr;
  function->function = PyCFunction_New(&function->method, self);
  return Py_BuildValue("(ON)", function->function, PyCFunction_New(&function->plain_method, self));
}

}  // namespace tokenmill::exchange
