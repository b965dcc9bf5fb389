#include "core/array.h"

#include <bit>
#include <stdexcept>

#include "core/fill.h"
#include "core/stream.h"
#include "cpu/pages.h"

namespace tokenmill {
namespace {

// Bit pattern of a value in the low bytes of a word.
uint32_t bits_of(double value, ScalarType dtype) {
  const uint32_t single = std::bit_cast<uint32_t>(static_cast<float>(value));
  switch (dtype) {
    case ScalarType::Float:
      return single;
    case ScalarType::BFloat16:
      return single >> 16;
    case ScalarType::Half:  // only 0 and the infinities
      return (single >> 16 & 0x8000u) | ((single & 0x7fffffffu) == 0 ? 0u : 0x7c00u);
    case ScalarType::Int:
      return static_cast<uint32_t>(static_cast<int32_t>(value));
    default:
      throw std::runtime_error("tokenmill: no values of this dtype are set");
  }
}

}  // namespace

Array empty(const std::vector<int64_t>& sizes, const View& like, std::optional<ScalarType> dtype) {
  Array made = like.framework->empty({sizes.data(), sizes.size()}, dtype.value_or(like.dtype),
                                     like.on_gpu, like.device);
  if (!made.on_gpu) cpu::prefer_huge_pages(made.pointer, made.numel() * made.element_bytes);
  made.note(true);
  return made;
}

void fill_array(double value, const View& array) {
  const int64_t count = array.numel();
  if (count == 0) return;
  if (!array.contiguous()) {
    View part = array;
    part.sizes = {array.sizes.data() + 1, array.sizes.size() - 1};
    part.strides = {array.strides.data() + 1, array.strides.size() - 1};
    for (int64_t i = 0; i < array.size(0); ++i) {
      part.pointer = array.mutable_data<char>() + i * array.step(0) * array.element_bytes;
      fill_array(value, part);
    }
    return;
  }
  const uint32_t bits = bits_of(value, array.dtype);
  if (array.is_cuda)
    return launch_on_device("fill", array,
                            FillParams{array.pointer, count, array.element_bytes, bits});
  if (array.element_bytes == 2)
    std::fill_n(array.mutable_data<uint16_t>(), count, static_cast<uint16_t>(bits));
  else
    std::fill_n(array.mutable_data<uint32_t>(), count, bits);
}

}  // namespace tokenmill
