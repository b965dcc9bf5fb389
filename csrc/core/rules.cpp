// Questions about a call, asked from Python: its arguments are described, and its operator is
// called with arrays without memory. The question for the rules ends where the call would begin to
// run, the question for the kernels at the launch.
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <sstream>

#include "core/check.h"
#include "core/door.h"
#include "core/stream.h"
#include "core/written.h"

namespace tokenmill {
namespace {

struct RulesHold {};

class Question : public Framework {
 public:
  explicit Question(bool float64) : float64_(float64) {}
  Array empty(Sizes, ScalarType, bool, int32_t) const override { throw RulesHold(); }
  void* stream(int32_t) const override { throw RulesHold(); }
  void begin() const override { throw RulesHold(); }
  bool takes_float64() const override { return float64_; }

 private:
  bool float64_;
};

class KernelQuestion : public Framework {
 public:
  explicit KernelQuestion(const Described& call) : inquiry_(call) {}
  Array empty(Sizes sizes, ScalarType dtype, bool, int32_t device) const override {
    const auto dim = static_cast<std::ptrdiff_t>(sizes.size());
    auto memory = std::make_shared<std::vector<int64_t>>(sizes.begin(), sizes.end());
    memory->resize(2 * dim);
    int64_t step = 1;
    for (auto i = dim; i-- > 0;) {
      (*memory)[dim + i] = step;
      step *= std::max<int64_t>(sizes[i], 1);
    }
    Array made;
    made.pointer = std::bit_cast<void*>(kNowhere);
    made.sizes = {memory->data(), static_cast<size_t>(dim)};
    made.strides = {memory->data() + dim, static_cast<size_t>(dim)};
    made.dtype = dtype;
    made.element_bytes = 4;  // fill_array reads no more of a dtype
    made.on_gpu = made.is_cuda = true;
    made.device = device;
    made.framework = this;
    made.owner = std::move(memory);
    return made;
  }
  void* stream(int32_t) const override { return nullptr; }
  Inquiry* inquiry() const override { return &inquiry_; }

 private:
  mutable Inquiry inquiry_;
};

// A number as Python shows it.
std::string shown(double x) {
  char text[40];
  const double size = std::abs(x);
  const bool fixed = size == 0 || (size >= 1e-4 && size < 1e16);
  const auto form = fixed ? std::chars_format::fixed : std::chars_format::scientific;
  const auto end = std::to_chars(text, text + sizeof text, x, form).ptr;
  const std::string all(text, end);
  return fixed && all.find('.') == all.npos ? all + ".0" : all;
}

class DescribedCall : public Described {
 public:
  DescribedCall(const Schema& schema, const Argument* arguments)
      : schema_(schema), arguments_(arguments) {}

  std::string value(std::string_view name) const override {
    const Argument* const a = find(name);
    if (!a || !a->given) return "None";
    switch (kind_of(name)) {
      case Kind::array:
        return "a tensor";
      case Kind::text:
        return std::string(a->text);
      case Kind::integer:
        return show(a->integer);
      case Kind::number:
        return shown(a->number);
      default:
        return show(a->boolean);
    }
  }
  std::string shape(std::string_view name) const override {
    const Argument* const a = find(name);
    return a && a->given ? show(a->view.sizes) : "None";
  }
  // (8704, 136, 68, 1)
  std::string strides(std::string_view name) const override {
    const Argument* const a = find(name);
    if (!a || !a->given) return "None";
    std::string text = show(a->view.strides);
    text.front() = '(';
    text.back() = ')';
    return text;
  }

 private:
  const Argument* find(std::string_view name) const {
    for (size_t i = 0; i < schema_.arguments.size(); ++i)
      if (schema_.arguments[i].name == name) return arguments_ + i;
    return nullptr;
  }
  Kind kind_of(std::string_view name) const {
    return schema_.arguments[find(name) - arguments_].kind;
  }

  const Schema& schema_;
  const Argument* arguments_;
};

// Reads the description of python/tokenmill/_call/rules.py, which has its layout.
class Description {
 public:
  Description(const int64_t* words, const double* numbers, const char* text,
              const Framework& question)
      : word_(words), number_(numbers), text_(text), question_(question) {}

  void read(const std::string& kinds, Argument* arguments) {
    for (char kind : kinds) *arguments++ = argument(static_cast<Kind>(kind));
  }

 private:
  Argument argument(Kind kind) {
    Argument a;
    a.given = *word_++ != 0;
    if (!a.given) return a;
    if (kind == Kind::array) {
      a.view = view();
    } else if (kind == Kind::text) {
      const auto length = static_cast<size_t>(*word_++);
      a.text = {text_, length};
      text_ += length;
    } else if (kind == Kind::number) {
      a.number = *number_++;
    } else if (kind == Kind::integer) {
      a.integer = *word_++;
    } else {
      a.boolean = *word_++ != 0;
    }
    return a;
  }

  View view() {
    View v;
    const auto dim = static_cast<size_t>(*word_++);
    v.dtype = static_cast<ScalarType>(*word_++);
    v.element_bytes = static_cast<int32_t>(*word_++);
    v.on_gpu = *word_++ != 0;
    v.device = static_cast<int32_t>(*word_++);
    v.pointer = std::bit_cast<void*>(*word_++);
    v.is_cuda = true;  // the host reads no values
    v.sizes = {word_, dim};
    v.strides = {word_ + dim, dim};
    word_ += 2 * dim;
    v.framework = &question_;
    return v;
  }

  const int64_t* word_;
  const double* number_;
  const char* text_;
  const Framework& question_;
};

Operator* find_operator(const char* name) {
  const auto found = all_operators().find(std::string_view(name));
  return found == all_operators().end() ? nullptr : found->second;
}

// Copies at most `capacity` bytes and returns the length of all.
int64_t copy(std::string_view text, char* to, int64_t capacity) {
  std::memcpy(to, text.data(), std::min(text.size(), static_cast<size_t>(capacity)));
  return static_cast<int64_t>(text.size());
}

}  // namespace
}  // namespace tokenmill

// Asks whether the described arguments keep the rules of an operator. Returns 0 if they do, or the
// length of the message, of which `error` holds `capacity` bytes; -1 for an unknown operator.
// float64: whether it is a valid dtype.
extern "C" __attribute__((visibility("default"))) int64_t
tokenmill_rules(const char* name, const int64_t* words, const double* numbers, const char* text,
                int32_t float64, char* error, int64_t capacity) {
  using namespace tokenmill;
  Operator* const op = find_operator(name);
  if (!op) return -1;
  const Question question(float64 != 0);
  Argument arguments[kMaxArguments];
  Array results[kMaxResults];
  Description(words, numbers, text, question).read(op->kinds, arguments);
  try {
    op->call(op->schema(), arguments, results, kMaxResults);
  } catch (const RulesHold&) {
  } catch (const std::exception& broken) {
    return copy(broken.what(), error, capacity);
  }
  return 0;
}

// Asks for the rules of an array that a function writes. names: its own and those of the arrays
// that the function reads, each with '\n' after it; words describe all of them. Answers as
// tokenmill_rules.
extern "C" __attribute__((visibility("default"))) int64_t tokenmill_written(
    const char* op, const char* names, const int64_t* words, char* error, int64_t capacity) {
  using namespace tokenmill;
  std::vector<std::string> each;
  std::istringstream stream(names);
  for (std::string name; std::getline(stream, name);) each.push_back(name);
  const Question question(true);
  std::vector<Argument> arrays(each.size());
  const std::string kinds(each.size(), static_cast<char>(Kind::array));
  Description(words, nullptr, nullptr, question).read(kinds, arrays.data());
  std::vector<Read> read;
  for (size_t i = 1; i < each.size(); ++i) read.emplace_back(each[i].c_str(), arrays[i].view);
  try {
    check_written(op, each[0].c_str(), arrays[0].view, read);
  } catch (const std::exception& broken) {
    return copy(broken.what(), error, capacity);
  }
  return 0;
}

// Asks which CUDA kernels take the described call: a line for each row of the table of its launch,
// as Inquiry writes it; no line for an operator without a table, and for a call that launches
// nothing. Returns the length of the answer, of which `answer` holds `capacity` bytes; -1 for an
// unknown operator; -2 - length for the message about a broken rule in its place.
extern "C" __attribute__((visibility("default"))) int64_t
tokenmill_kernels(const char* name, const int64_t* words, const double* numbers, const char* text,
                  char* answer, int64_t capacity) {
  using namespace tokenmill;
  Operator* const op = find_operator(name);
  if (!op) return -1;
  Argument arguments[kMaxArguments];
  Array results[kMaxResults];
  try {
    const DescribedCall call(op->schema(), arguments);
    const KernelQuestion question(call);
    Description(words, numbers, text, question).read(op->kinds, arguments);
    try {
      op->call(op->schema(), arguments, results, kMaxResults);
    } catch (const Answered&) {
    }
    return copy(question.inquiry()->text(), answer, capacity);
  } catch (const std::exception& broken) {
    return -2 - copy(broken.what(), answer, capacity);
  }
}
