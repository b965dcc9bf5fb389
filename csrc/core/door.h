// Calling convention of operators. The arguments of an operator are one record, an aggregate with
// its fields in schema order; both entry points, torch's dispatcher (core/torch.cpp) and DLPack
// (bindings.cpp), pass a list of arguments, from which the record is made here.
#pragma once
#include <atomic>
#include <concepts>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "core/array.h"

namespace tokenmill {

// Kind of an argument: an array (Tensor), text (str), int, float or bool.
enum class Kind : char { array = 'a', text = 's', integer = 'i', number = 'f', boolean = 'b' };

// One argument as an entry point passes it. The schema gives its kind.
struct Argument {
  View view;
  std::string_view text;
  union {
    int64_t integer = 0;
    double number;
    bool boolean;
  };
  bool given = true;  // false: None
};

struct SchemaArgument {
  std::string name;
  Kind kind;
  bool optional;
  bool written;  // "(a!)"
  bool has_default;
  Argument value;    // default value
  std::string text;  // storage of value.text
};

struct Schema {
  explicit Schema(std::string_view text);
  std::string name;
  std::vector<SchemaArgument> arguments;
  std::vector<std::string> results;
};

// Called by library.cpp.
void define_schema(std::string_view text);
// Throws if there is no such schema.
const Schema& schema_of(std::string_view name);

// Base class of records: the call as it was passed.
struct Record {
  const Schema* schema = nullptr;
  const Argument* arguments = nullptr;
  size_t wanted = 0;  // results that the caller takes: the first ones
};

// An optional number. Not std::optional, which would convert from the type of any field.
template <typename T>
class Optional {
 public:
  Optional() = default;
  Optional(bool given, T value) : given_(given), value_(value) {}
  explicit operator bool() const { return given_; }
  T operator*() const { return value_; }
  T value_or(T other) const { return given_ ? value_ : other; }

 private:
  bool given_ = false;
  T value_{};
};

template <typename T>
concept IsRecord = std::derived_from<T, Record>;
template <typename T>
concept IsField = std::same_as<T, View> || std::same_as<T, std::string_view> ||
                  std::same_as<T, int64_t> || std::same_as<T, double> || std::same_as<T, bool> ||
                  std::same_as<T, Optional<int64_t>> || std::same_as<T, Optional<double>>;

template <IsField T>
T field_of(const Argument& a) {
  if constexpr (std::same_as<T, View>) {
    if (a.view) a.view.note(false);
    return a.view;
  } else if constexpr (std::same_as<T, std::string_view>) {
    return a.text;
  } else if constexpr (std::same_as<T, int64_t>) {
    return a.integer;
  } else if constexpr (std::same_as<T, double>) {
    return a.number;
  } else if constexpr (std::same_as<T, bool>) {
    return a.boolean;
  } else if constexpr (std::same_as<T, Optional<int64_t>>) {
    return {a.given, a.integer};
  } else {
    return {a.given, a.number};
  }
}

template <IsField T>
constexpr Kind kind_of() {
  if constexpr (std::same_as<T, View>) return Kind::array;
  if constexpr (std::same_as<T, std::string_view>) return Kind::text;
  if constexpr (std::same_as<T, int64_t> || std::same_as<T, Optional<int64_t>>)
    return Kind::integer;
  if constexpr (std::same_as<T, double> || std::same_as<T, Optional<double>>) return Kind::number;
  return Kind::boolean;
}

// Converts to the next field of a record, of any type, taken from the source.
template <typename Source>
struct NextField {
  Source& source;
  template <typename T>
    requires IsField<T> || IsRecord<T>
  operator T() const {
    return source.template take<T>();
  }
};

struct NoSource {
  template <typename T>
  T take();
};

template <typename T, size_t... i>
constexpr bool has_fields(std::index_sequence<i...>) {
  return requires(NoSource& s) { T{{}, (void(i), NextField<NoSource>{s})...}; };
}

template <IsRecord T, size_t n = 0>
constexpr size_t field_count() {
  if constexpr (has_fields<T>(std::make_index_sequence<n + 1>()))
    return field_count<T, n + 1>();
  else
    return n;
}

// Braced initialisers are evaluated in field order.
template <IsRecord T, typename Source>
T record_from(Source& source) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return T{{}, (void(i), NextField<Source>{source})...};
  }(std::make_index_sequence<field_count<T>()>());
}

struct Arguments {
  const Argument* next;
  template <typename T>
  T take() {
    if constexpr (IsRecord<T>)
      return record_from<T>(*this);
    else
      return field_of<T>(*next++);
  }
};

// Collects the kinds of the fields of a record.
struct Kinds {
  std::string text;
  template <typename T>
  T take() {
    if constexpr (IsRecord<T>) {
      return record_from<T>(*this);
    } else {
      text += static_cast<char>(kind_of<T>());
      return T{};
    }
  }
};

constexpr size_t kMaxArguments = 48, kMaxResults = 8;  // limits for any schema

struct Operator {
  const char* name;
  void (*call)(const Schema& schema, const Argument* arguments, Array* results, size_t wanted);
  void (*boxed)(uint64_t* stack, uint64_t inputs, uint64_t outputs);  // torch's calling convention
  std::string kinds;                                                  // of the fields of the record
  std::atomic<const Schema*> found = nullptr;

  const Schema& schema() {
    const Schema* known = found.load(std::memory_order_acquire);
    if (!known) found.store(known = &checked_schema(), std::memory_order_release);
    return *known;
  }

 private:
  const Schema& checked_schema() const;  // throws if the schema does not match the record
};

inline void store(Array* results, Array one) { *results = std::move(one); }
template <typename... All>
void store(Array* results, std::tuple<All...> all) {
  std::apply([&](auto&... each) { ((*results++ = std::move(each)), ...); }, all);
}

void torch_call(Operator& op, uint64_t* stack, uint64_t inputs, uint64_t outputs);

template <auto function>
struct Implementation;

template <typename Result, IsRecord Args, Result (*function)(const Args&)>
struct Implementation<function> {
  static void call(const Schema& schema, const Argument* arguments, Array* results, size_t wanted) {
    [[maybe_unused]] emulated::Frame frame;  // notes of this call last as long as the call
    Arguments source{arguments};
    Args args = record_from<Args>(source);
    args.schema = &schema;
    args.arguments = arguments;
    args.wanted = wanted;
    if constexpr (std::is_void_v<Result>)
      function(args);
    else
      store(results, function(args));
  }
  static std::string kinds() {
    Kinds kinds;
    record_from<Args>(kinds);
    return std::move(kinds.text);
  }
};

// The operator `name`, implemented by a function of its record.
template <auto function>
Operator& implement(const char* name) {
  using Of = Implementation<function>;
  static Operator op{name, Of::call,
                     [](uint64_t* stack, uint64_t inputs, uint64_t outputs) {
                       torch_call(op, stack, inputs, outputs);
                     },
                     Of::kinds()};
  return op;
}

#if defined(TOKENMILL_RULES_ONLY)
constexpr bool kHasKernels = false;  // the build leaves out the operators of this file
#else
constexpr bool kHasKernels = true;
#endif

// Registers operators for CPU and, in builds that have it, CUDA. Without kernels, only their rules.
struct Registration {
  Registration(std::initializer_list<Operator*> operators, bool has_kernels = kHasKernels);
};

// A library as module _C finds it, with the schemas of its operators.
struct Library {
  std::vector<Operator*> operators;  // with kernels
  bool cuda;                         // has kernels for GPUs
  bool emulated;                     // runs them on the PTX machine
};
Library& this_library();

// Records whose rules can be asked, by the name of the operator (core/rules.cpp).
std::map<std::string, Operator*, std::less<>>& all_operators();

}  // namespace tokenmill
