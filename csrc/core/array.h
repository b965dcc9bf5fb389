// Framework-independent arrays as operators see them: a pointer and metadata.
#pragma once
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/dtype.h"
#include "core/emulated.h"

namespace tokenmill {

using torch::headeronly::ScalarType;

// Sizes or strides, stored by the framework.
struct Sizes : std::span<const int64_t> {
  using span::span;
  operator std::vector<int64_t>() const { return {begin(), end()}; }
  template <typename Other>
  bool operator==(const Other& other) const {
    return std::equal(begin(), end(), other.begin(), other.end());
  }
};

class Framework;
class Inquiry;  // core/kernels.h

constexpr int32_t kMeta = -2;  // device of tensors without memory
// Address of an argument that is described without memory. Not null: the argument is given.
constexpr uintptr_t kNowhere = 256;

// An argument, owned by the caller. False: an optional argument that was not given.
struct View {
  explicit operator bool() const { return framework != nullptr; }

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }
  int64_t size(int64_t i) const { return sizes[i < 0 ? i + dim() : i]; }
  // Stride to step by, 0 where the dimension is broadcast.
  int64_t step(int64_t i) const { return size(i) == 1 ? 0 : strides[i < 0 ? i + dim() : i]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t size : sizes) n *= size;
    return n;
  }
  bool last_contiguous() const {
    return dim() == 0 || size(-1) <= 1 || strides.back() == 1 || numel() == 0;
  }
  bool has_memory() const { return pointer && reinterpret_cast<uintptr_t>(pointer) != kNowhere; }
  bool contiguous() const {
    int64_t wanted = 1;
    for (int64_t i = dim(); i-- > 0;) {
      if (size(i) != 1 && strides[i] != wanted) return numel() == 0;
      wanted *= size(i);
    }
    return true;
  }
  template <typename T = void>
  const T* data() const {
    return static_cast<const T*>(pointer);
  }
  template <typename T = void>
  T* mutable_data() const {
    return static_cast<T*>(pointer);
  }

  // Notes for the PTX machine the elements that the strides reach, not the rest of the storage.
  void note(bool writable) const {
    if constexpr (emulated::kBuilt) {
      int64_t last = 0;
      for (int64_t i = 0; i < dim(); ++i) last += (size(i) - 1) * strides[i];
      if (numel() > 0) emulated::note(pointer, (last + 1) * element_bytes, writable);
    }
  }

  void* pointer = nullptr;
  Sizes sizes, strides;
  ScalarType dtype = ScalarType::Undefined;
  int32_t element_bytes = 0;
  bool on_gpu = false;
  bool is_cuda = false;  // is served by launch_cuda: on a GPU, or emulated on the PTX machine
  int32_t device = 0;
  const Framework* framework = nullptr;
};

// Memory that an operator allocates: results and workspaces. Copies share the memory.
struct Array : View {
  std::shared_ptr<void> owner;
};

// Source of arrays: allocates memory, and knows the current stream.
class Framework {
 public:
  virtual ~Framework() = default;
  virtual Array empty(Sizes sizes, ScalarType dtype, bool on_gpu, int32_t device) const = 0;
  virtual void* stream(int32_t device) const = 0;
  // The rules of the call hold, and it begins to run. A call with results need not say so.
  virtual void begin() const {}
  // Whether float64 is a valid dtype: for the reference, whose rules are asked here.
  virtual bool takes_float64() const { return false; }
  // Not null: a launch does not run, and answers which kernels take it.
  virtual Inquiry* inquiry() const { return nullptr; }
};

// A new contiguous array on the device of `like`; dtype defaults to like.dtype.
Array empty(const std::vector<int64_t>& sizes, const View& like,
            std::optional<ScalarType> dtype = std::nullopt);

// Sets all elements of arrays in float32, float16, bfloat16 or int32, with any strides: for results
// that no kernel writes, such as without queries.
void fill_array(double value, const View& array);
template <typename... Arrays>
void fill(double value, const Arrays&... arrays) {
  (fill_array(value, arrays), ...);
}

inline Array zeros(const std::vector<int64_t>& sizes, const View& like, ScalarType dtype) {
  Array made = empty(sizes, like, dtype);
  fill(0, made);
  return made;
}

inline bool is_kernel_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}
inline bool has_kernel_dtype(const View& t) {
  return is_kernel_dtype(t.dtype) ||
         (t.dtype == ScalarType::Double && t.framework->takes_float64());
}
// Dtype of float32 arguments of a call on t: float64 if t is.
inline ScalarType wide_dtype(const View& t) {
  return t.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DType to_dtype(ScalarType t) {
  return t == ScalarType::Half            ? DType::float16
         : t == ScalarType::BFloat16      ? DType::bfloat16
         : t == ScalarType::Float8_e4m3fn ? DType::float8_e4m3fn
                                          : DType::float32;
}

inline bool same_device(const View& a, const View& b) {
  return a.is_cuda == b.is_cuda && a.on_gpu == b.on_gpu && a.device == b.device;
}

}  // namespace tokenmill
