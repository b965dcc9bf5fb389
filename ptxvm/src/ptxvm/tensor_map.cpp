#include "ptxvm/tensor_map.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

namespace ptxvm {
namespace {

using Element = Transfer::Element;

// Bits `first` to `first + count - 1` of a word.
struct Field {
  int word, first, count;

  uint64_t mask() const { return ((uint64_t{1} << count) - 1) << first; }
  uint64_t of(const uint64_t* words) const { return (words[word] & mask()) >> first; }
  void set(uint64_t* words, uint64_t value) const {
    words[word] = (words[word] & ~mask()) | (value << first & mask());
  }
};

constexpr Field kKind{1, 0, 4}, kRank{1, 4, 3}, kElement{1, 7, 4}, kSwizzle{1, 13, 2};
constexpr Field kFillNan{1, 15, 1};  // the machine's choice, no such map is known
constexpr Field kRoundsToTf32{1, 16, 1};
constexpr Field kAlwaysSet{1, 18, 1};
constexpr Field kPromotion{1, 20, 2};
constexpr uint64_t kTiled = 2;  // kKind
constexpr uint32_t kF32 = 7, kTf32 = 11, kTypes = 12;

// Dimensions; of strides the bits 4 to 35, and 36 to 39.
constexpr Field stride_low(int d) { return {(d + 1) / 2 + (d % 2 ? 0 : 1), d % 2 ? 32 : 0, 32}; }
constexpr Field stride_high(int d) { return {3, 28 + 4 * d, 4}; }
constexpr Field extent(int d) { return {4 + d / 2, d % 2 * 32, 32}; }
constexpr Field box_of(int d) { return d == 0 ? Field{6, 56, 8} : Field{7, 8 * (d - 1), 8}; }

std::string unknown_bits(const uint64_t* words) {
  uint64_t known[kTensorMapWords] = {};
  const auto add = [&](const Field& field) { known[field.word] |= field.mask(); };
  for (const Field& field :
       {kKind, kRank, kElement, kSwizzle, kFillNan, kRoundsToTf32, kAlwaysSet, kPromotion})
    add(field);
  known[0] = ~uint64_t{0};
  for (int d = 0; d < kMaxRank; ++d) {
    if (d) add(stride_low(d));
    if (d) add(stride_high(d));
    add(extent(d));
    add(box_of(d));
  }
  for (int i = 1; i < 8; ++i) {
    char text[64];
    if (const uint64_t bits = words[i] & ~known[i]) {
      std::snprintf(text, sizeof text, "bits 0x%" PRIx64 " of word %d are unknown", bits, i);
      return text;
    }
  }
  return {};
}

}  // namespace

bool find_element(uint32_t number, Element& element, uint8_t& bytes) {
  struct Entry {
    Element element;
    uint8_t bytes;  // 0: not supported
  };
  static constexpr Entry kEntries[kTypes] = {
      {Element::b8, 1},  {Element::b8, 2},   {Element::u32, 4},
      {Element::s32, 4}, {Element::u64, 8},  {Element::s64, 8},
      {Element::f16, 2}, {Element::f32, 4},  {},
      {Element::f64, 8}, {Element::bf16, 2}, {Element::tf32, 4}};
  if (number >= kTypes || !kEntries[number].bytes) return false;
  element = kEntries[number].element;
  bytes = kEntries[number].bytes;
  return true;
}

void pack(const TensorMap& map, uint32_t element_number, uint64_t words[kTensorMapWords]) {
  std::fill_n(words, kTensorMapWords, 0);
  words[0] = map.base;
  kKind.set(words, kTiled);
  kRank.set(words, map.rank - 1u);
  kElement.set(words, element_number == kTf32 ? kF32 : element_number);
  kRoundsToTf32.set(words, element_number == kTf32);
  kSwizzle.set(words, map.swizzle);
  kFillNan.set(words, map.fill_nan);
  kAlwaysSet.set(words, 1);
  kPromotion.set(words, map.promotion);
  for (int d = 0; d < map.rank; ++d) {
    if (d) stride_low(d).set(words, map.strides[d] >> 4);
    if (d) stride_high(d).set(words, map.strides[d] >> 36);
    extent(d).set(words, map.extents[d] - 1u);
    box_of(d).set(words, map.box[d] - 1u);
  }
}

std::string replace_field(uint64_t words[kTensorMapWords], const std::string& field, int dimension,
                          uint64_t value) {
  const auto must = [&](const char* rule) {
    return field + ": must be " + rule + "; got " + std::to_string(value);
  };
  Element element;
  uint8_t bytes;
  kKind.set(words, kTiled);
  kAlwaysSet.set(words, 1);
  if (field == "global_address") {
    words[0] = value;
  } else if (field == "rank") {
    if (value >= kMaxRank) return must("the rank less 1, from 0 to 4");
    kRank.set(words, value);
  } else if (field == "box_dim") {
    if (value < 1 || value > 256) return must("from 1 to 256");
    box_of(dimension).set(words, value - 1);
  } else if (field == "global_dim") {
    extent(dimension).set(words, value - 1);  // 0: 2^32
  } else if (field == "global_stride") {
    if (dimension + 1 == kMaxRank) return "global_stride: has 4 dimensions";
    if (value % 16 || value >> 40) return must("a multiple of 16 below 2^40");
    stride_low(dimension + 1).set(words, value >> 4);
    stride_high(dimension + 1).set(words, value >> 36);
  } else if (field == "element_stride") {
    if (value != 1) return must("1 here");
  } else if (field == "elemtype") {
    if (!find_element(static_cast<uint32_t>(value), element, bytes))
      return must("a type that the machine knows");
    kElement.set(words, value == kTf32 ? kF32 : value);
    kRoundsToTf32.set(words, value == kTf32);
  } else if (field == "swizzle_mode") {
    if (value > 3) return must("from 0 to 3");
    kSwizzle.set(words, value);
  } else if (field == "fill_mode") {
    if (value > 1) return must("0 or 1");
    kFillNan.set(words, value);
  } else if (value != 0) {
    return must("0 here");
  }
  return {};
}

std::string unpack(const uint64_t words[kTensorMapWords], TensorMap& map) {
  if (kKind.of(words) != kTiled) return "no tensor map (cuTensorMapEncodeTiled) at its address";
  const std::string at = "the tensor map at its address: ";
  if (const std::string bits = unknown_bits(words); !bits.empty()) return at + bits;
  map = {};
  map.base = words[0];
  map.rank = static_cast<uint8_t>(kRank.of(words) + 1);
  if (map.rank > kMaxRank) return at + "rank " + std::to_string(map.rank);
  const uint64_t number = kElement.of(words);
  const bool rounds = kRoundsToTf32.of(words);
  if ((rounds && number != kF32) ||
      !find_element(rounds ? kTf32 : static_cast<uint32_t>(number), map.element, map.element_bytes))
    return at + "element type " + std::to_string(number);
  map.swizzle = static_cast<uint8_t>(kSwizzle.of(words));
  map.promotion = static_cast<uint8_t>(kPromotion.of(words));
  map.fill_nan = kFillNan.of(words);
  map.strides[0] = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) {
    if (d) map.strides[d] = stride_high(d).of(words) << 36 | stride_low(d).of(words) << 4;
    map.extents[d] = static_cast<uint32_t>(std::min<uint64_t>(extent(d).of(words) + 1, UINT32_MAX));
    map.box[d] = static_cast<uint16_t>(box_of(d).of(words) + 1);
  }
  const uint32_t row = map.box[0] * map.element_bytes;
  if (map.base % 16 || row % 16) return at + "base and rows must be multiples of 16 bytes";
  if (map.swizzle && row != 16u << map.swizzle)
    return at + "a row of " + std::to_string(row) + " bytes under a swizzle of " +
           std::to_string(16u << map.swizzle);
  return {};
}

}  // namespace ptxvm
