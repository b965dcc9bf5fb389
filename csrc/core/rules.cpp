// The rules of a call, asked from Python: its arguments are described, and its operator is called
// with arrays without memory. The call ends where it would begin to run.
#include <bit>
#include <cstring>

#include "core/door.h"

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

// Reads the description of python/tokenmill/_call/rules.py, which has its layout.
class Description {
 public:
  Description(const int64_t* words, const double* numbers, const char* text)
      : word_(words), number_(numbers), text_(text) {}

  Argument argument(Kind kind, const Question& question) {
    Argument a;
    a.given = *word_++ != 0;
    if (!a.given) return a;
    if (kind == Kind::array) {
      a.view = view(question);
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

 private:
  View view(const Question& question) {
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
    v.framework = &question;
    return v;
  }

  const int64_t* word_;
  const double* number_;
  const char* text_;
};

}  // namespace
}  // namespace tokenmill

// Asks whether the described arguments keep the rules of an operator. Returns 0 if they do, or the
// length of the message, of which `error` holds `capacity` bytes; -1 for an unknown operator.
// float64: whether it is a valid dtype.
extern "C" __attribute__((visibility("default"))) int64_t
tokenmill_rules(const char* name, const int64_t* words, const double* numbers, const char* text,
                int32_t float64, char* error, int64_t capacity) {
  using namespace tokenmill;
  const auto found = all_operators().find(std::string_view(name));
  if (found == all_operators().end()) return -1;
  Operator& op = *found->second;
  const Question question(float64 != 0);
  Array results[kMaxResults];
  try {
    Description description(words, numbers, text);
    Argument arguments[kMaxArguments];
    const std::string& kinds = op.kinds;
    for (size_t i = 0; i < kinds.size(); ++i)
      arguments[i] = description.argument(static_cast<Kind>(kinds[i]), question);
    op.call(arguments, results);
  } catch (const RulesHold&) {
  } catch (const std::exception& broken) {
    const size_t length = std::strlen(broken.what());
    std::memcpy(error, broken.what(), std::min(length, static_cast<size_t>(capacity)));
    return static_cast<int64_t>(length);
  }
  return 0;
}
