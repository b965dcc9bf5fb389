// Tensors as the checks and launchers want them: metadata read once (every accessor of the stable
// ABI is a C call).
#pragma once
#include <string_view>
#include <vector>

#include "core/box.h"
#include "core/dtype.h"
#include "core/stable.h"
#include "cpu/pages.h"

namespace tokenmill {

struct View {
  explicit View(const Tensor& t)
      : tensor(t),
        sizes(t.sizes().begin(), t.sizes().end()),
        strides(t.strides().begin(), t.strides().end()),
        dtype(t.scalar_type()),
        is_cuda(emulated::kEnabled || t.is_cuda()),
        device(t.get_device_index()) {
    note(false);
  }

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }
  int64_t size(int64_t i) const { return sizes[i < 0 ? i + dim() : i]; }
  // The stride to step by, 0 where the dimension is broadcast.
  int64_t step(int64_t i) const { return size(i) == 1 ? 0 : strides[i < 0 ? i + dim() : i]; }
  bool last_contiguous() const {
    return dim() == 0 || size(-1) <= 1 || strides.back() == 1 || tensor.numel() == 0;
  }
  template <typename T = void>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  template <typename T = void>
  T* mutable_data() const {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  // Tells the PTX machine of the elements that the strides reach: not of the rest of the storage.
  void note(bool writable) const {
    if constexpr (emulated::kEnabled) {
      int64_t last = 0;
      for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
      if (tensor.numel() > 0)
        emulated::note(tensor.const_data_ptr(), (last + 1) * tensor.element_size(), writable);
    }
  }

  const Tensor& tensor;
  std::vector<int64_t> sizes, strides;
  ScalarType dtype;
  bool is_cuda;  // runs launch_cuda: the tensor is on a GPU, or the PTX machine stands in for one
  int32_t device;
};

inline bool is_kernel_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

inline DType to_dtype(ScalarType t) {
  return t == ScalarType::Half       ? DType::float16
         : t == ScalarType::BFloat16 ? DType::bfloat16
                                     : DType::float32;
}

inline bool same_device(const View& a, const View& b) {
  return a.is_cuda == b.is_cuda && a.device == b.device;
}

inline std::string show_device(const View& v) {
  return v.tensor.is_cuda() ? "cuda:" + std::to_string(v.device) : "cpu";
}

// A fresh contiguous tensor on the device of `like`; dtype defaults to that of `like`.
inline Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like,
                    std::optional<ScalarType> dtype = std::nullopt) {
  Tensor made = torch::stable::new_empty(like, sizes, dtype);
  if (!made.is_cuda())
    cpu::prefer_huge_pages(made.mutable_data_ptr(),
                           made.numel() * static_cast<int64_t>(made.element_size()));
  if constexpr (emulated::kEnabled) View(made).note(true);
  return made;
}

}  // namespace tokenmill
