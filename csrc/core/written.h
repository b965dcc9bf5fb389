// Checks of outputs given by the caller.
#pragma once
#include <algorithm>
#include <limits>
#include <numeric>
#include <span>

#include "core/check.h"
#include "core/door.h"

namespace tokenmill {

// Addresses of the elements of a tensor.
struct Places {
  explicit Places(const View& t)
      : view(t), begin(static_cast<const char*>(t.data())), width(t.element_bytes) {}
  bool none() const {
    return std::find(view.sizes.begin(), view.sizes.end(), 0) != view.sizes.end();
  }
  const View& view;
  const char* begin;
  int64_t width;  // bytes per element
};

// True if no two indices share an address. A layout whose dimensions interleave, none stepping over
// the whole of the others, counts as sharing.
inline bool elements_apart(const Places& t) {
  if (t.none()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < t.view.dim(); ++i)
    if (t.view.size(i) > 1) dims.emplace_back(t.view.strides[i], t.view.size(i));
  std::sort(dims.begin(), dims.end());
  int64_t last = 0;  // offset of the last element over the dimensions so far
  for (const auto& [stride, size] : dims) {
    if (stride <= last) return false;
    last += (size - 1) * stride;
  }
  return true;
}

// Range of multiples of a stride.
struct Step {
  int64_t stride, minimum, maximum;
};

// True if `at` plus multiples of the strides from index i on falls into low .. high, or if more
// than `left` steps are needed to decide. Strides are in descending order.
inline bool meets(const std::vector<Step>& steps, size_t i, int64_t at, int64_t low, int64_t high,
                  int& left) {
  if (i == steps.size()) return low <= at && at <= high;
  int64_t minimum = at, maximum = at;  // range of at plus all later strides
  for (size_t j = i + 1; j < steps.size(); ++j) {
    minimum += steps[j].stride * steps[j].minimum;
    maximum += steps[j].stride * steps[j].maximum;
  }
  const int64_t stride = steps[i].stride;
  const auto floor = [stride](int64_t x) { return x / stride - (x % stride < 0); };
  const int64_t last = std::min(steps[i].maximum, floor(high - minimum));
  for (int64_t n = std::max(steps[i].minimum, -floor(maximum - low)); n <= last; ++n)
    if (--left < 0 || meets(steps, i + 1, at + n * stride, low, high, left)) return true;
  return false;
}

// max multiples of strides tried per pair of tensors
constexpr int kSearched = 4096;

// True if an element of a may overlap one of b. For each cut, strides >= cut step by multiples of
// their greatest common divisor; the spans of the other strides are compared modulo it. This
// separates slices of one tensor along any dimension, such as interleaved keys and values. The
// remaining cases are searched: pages with a gap between them. A search that takes too long counts
// as sharing.
inline bool share_memory(const Places& a, const Places& b) {
  if (a.none() || b.none()) return false;
  const int64_t apart = b.begin - a.begin;
  const auto separate = [&](int64_t cut) {
    int64_t step = 0, span_a = a.width, span_b = b.width;
    const auto add = [&](const Places& t, int64_t& span) {
      for (int64_t i = 0; i < t.view.dim(); ++i) {
        const int64_t stride = t.view.step(i) * t.width;
        if (stride >= cut)
          step = std::gcd(step, stride);
        else
          span += (t.view.size(i) - 1) * stride;
      }
    };
    add(a, span_a);
    add(b, span_b);
    if (step == 0) return apart >= span_a || -apart >= span_b;
    const int64_t from = (apart % step + step) % step;
    return from >= span_a && from + span_b <= step;
  };
  if (separate(std::numeric_limits<int64_t>::max())) return false;
  for (const Places* t : {&a, &b})
    for (int64_t i = 0; i < t->view.dim(); ++i)
      if (t->view.step(i) > 0 && separate(t->view.step(i) * t->width)) return false;
  std::vector<Step> steps;
  for (const Places* t : {&a, &b})
    for (int64_t i = 0; i < t->view.dim(); ++i) {
      const int64_t last = t->view.size(i) - 1, stride = t->view.step(i) * t->width;
      if (stride <= 0) continue;
      auto at = std::find_if(steps.begin(), steps.end(),
                             [&](const Step& step) { return step.stride <= stride; });
      if (at == steps.end() || at->stride < stride) at = steps.insert(at, {stride, 0, 0});
      (t == &a ? at->minimum : at->maximum) += t == &a ? -last : last;
    }
  int left = kSearched;
  return meets(steps, 0, apart, 1 - b.width, a.width - 1, left);
}

struct Read {
  Read(const char* name, const View& t) : name(name), view(t ? &t : nullptr) {}
  const char* name;
  const View* view;  // null: not given
};

// Checks that each element has an address of its own, and that none overlaps memory that the call
// reads.
inline void check_written(const char* op, const char* name, const View& t,
                          std::span<const Read> read) {
  if (!t.has_memory()) return;
  const Places places(t);
  check(elements_apart(places), op, name,
        "must have each element at an address of its own; strides", t.strides);
  for (const Read& other : read)
    check(!other.view || !other.view->has_memory() || !share_memory(places, Places(*other.view)),
          op, name, Rule("must not share memory with ", other.name, "; strides"), t.strides);
}

// Checks all arguments that a call writes, each with all that it reads and those before it.
inline void check_written(const char* op, const Record& call) {
  const std::vector<SchemaArgument>& all = call.schema->arguments;
  std::vector<std::string> names;
  for (const SchemaArgument& a : all)
    names.push_back(a.name.ends_with("_out") ? a.name.substr(0, a.name.size() - 4) : a.name);
  for (size_t i = 0; i < all.size(); ++i) {
    if (!all[i].written || !call.arguments[i].given) continue;
    std::vector<Read> read;
    for (size_t j = 0; j < all.size(); ++j)
      if (all[j].kind == Kind::array && (!all[j].written || j < i))
        read.emplace_back(names[j].c_str(), call.arguments[j].view);
    check_written(op, names[i].c_str(), call.arguments[i].view, read);
  }
}

}  // namespace tokenmill
