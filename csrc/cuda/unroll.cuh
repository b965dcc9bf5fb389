// A loop whose index is a compile-time constant, for immediate operands of inline assembly.
#pragma once
#include <utility>

namespace tokenmill::cuda {

template <int kValue>
struct Index {
  static constexpr int value = kValue;
  __host__ __device__ constexpr operator int() const { return kValue; }
};

// body(Index<0>{}) ... body(Index<kCount - 1>{})
template <int kCount, typename Body>
__device__ __forceinline__ void unroll(const Body& body) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    (body(Index<kIndices>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace tokenmill::cuda
