// Vocabulary of the instruction files: an operation on scalars becomes a handler for 32 lanes, as a
// plain loop that the compiler vectorises.
#pragma once
#include <bit>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ptxvm/machine.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ptxvm {

// Representation of a value in a slot: halves are structures, which loops handle best as integers.
template <typename T>
using Raw = std::conditional_t<std::is_class_v<T>, uint16_t, T>;

// destination[i] = Op::apply(source[i] ...). Slots: destination, sources.
//
// A destination either is the slot of a source or overlaps none. If all types have one size, each
// lane is read before it is written, so the loop may write in place; otherwise it goes through a
// copy.
template <typename Op, typename D, typename... S, size_t... I>
inline void map_slots(Warp& warp, const Instruction& in, Mask mask, std::index_sequence<I...>) {
  const std::tuple<const Raw<S>*...> sources{lanes<const Raw<S>>(warp, in.slots[1 + I])...};
  const auto apply = [&](int i) {
    return std::bit_cast<Raw<D>>(Op::apply(std::bit_cast<S>(std::get<I>(sources)[i])...));
  };
  Raw<D>* destination = lanes<Raw<D>>(warp, in.slots[0]);
  if constexpr (((sizeof(D) == sizeof(S)) && ...)) {
    if (mask == kFullMask) {
#pragma GCC ivdep
      for (int i = 0; i < kLanes; ++i) destination[i] = apply(i);
      return;
    }
  }
  alignas(64) Raw<D> values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = apply(i);
  assign(destination, values, mask);
}

template <typename Op, typename D, typename... S>
void map_lanes(Warp& warp, const Instruction& in, Mask mask) {
  map_slots<Op, D, S...>(warp, in, mask, std::index_sequence_for<S...>{});
}

// Mask of the lanes whose flag is not 0; flags are 0 or -1.
inline Mask pack_mask(const int32_t* flags) {
  Mask mask = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < kLanes; i += 16)
    mask |= static_cast<Mask>(_mm512_test_epi32_mask(_mm512_loadu_si512(flags + i),
                                                     _mm512_loadu_si512(flags + i)))
            << i;
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 8)
    mask |= static_cast<Mask>(_mm256_movemask_ps(_mm256_castsi256_ps(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags + i)))))
            << i;
#else
  for (int i = 0; i < kLanes; ++i) mask |= (flags[i] & Mask{1}) << i;
#endif
  return mask;
}

// Mask of the lanes for which Op::apply(source[i] ...) holds.
template <typename Op, typename... S>
inline Mask test_lanes(const S*... sources) {
  alignas(64) int32_t flags[kLanes];
  for (int i = 0; i < kLanes; ++i) flags[i] = Op::apply(sources[i]...) ? -1 : 0;
  return pack_mask(flags);
}

// Writes a predicate for the lanes in the mask; the destination may be absent.
inline void assign_predicate(Warp& warp, uint32_t slot, Mask value, Mask mask) {
  if (slot == kNoSlot) return;
  Mask& destination = predicate(warp, slot);
  destination = (destination & ~mask) | (value & mask);
}

// All lanes of a source predicate; false if it is absent.
inline Mask read_predicate(Warp& warp, uint32_t slot, bool negated) {
  const Mask value = slot == kNoSlot ? 0 : predicate(warp, slot);
  return negated ? ~value : value;
}

template <typename T>
inline void broadcast(Warp& warp, uint32_t slot, T value, Mask mask) {
  if (slot == kNoSlot) return;
  T* destination = lanes<T>(warp, slot);
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) destination[i] = value;
}

// A register of `bits` bits read as T: the low bits of a wider register.
template <typename T>
inline void load_lanes(Warp& warp, uint32_t slot, int bits, T* values) {
  const auto narrow = [&]<typename R>(R) {
    const R* source = lanes<const R>(warp, slot);
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (sizeof(R) == sizeof(T))
        values[i] = std::bit_cast<T>(source[i]);
      else if constexpr (sizeof(T) == 1)
        values[i] = std::bit_cast<T>(static_cast<uint8_t>(source[i]));
      else if constexpr (sizeof(T) == 2)
        values[i] = std::bit_cast<T>(static_cast<uint16_t>(source[i]));
      else if constexpr (sizeof(T) == 4)
        values[i] = std::bit_cast<T>(static_cast<uint32_t>(source[i]));
    }
  };
  if (bits == 8) narrow(uint8_t{});
  if (bits == 16) narrow(uint16_t{});
  if (bits == 32) narrow(uint32_t{});
  if (bits == 64) narrow(uint64_t{});
}

}  // namespace ptxvm
