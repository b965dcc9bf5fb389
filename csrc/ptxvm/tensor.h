// Fragments of mma: which element of a matrix a lane's register holds (PTX ISA, "Matrix Fragments
// for mma.m16n8k*"). `per` elements share a 32-bit register; lanes form 8 groups of 4.
#pragma once
#include "ptxvm/machine.h"

namespace ptxvm {

struct Place {
  int row, column;
};

// A is 16 x k, B is k x 8, C and D are 16 x 8.
constexpr Place place_in_a(int lane, int slot, int element, int per) {
  return {lane / 4 + 8 * (slot % 2), (lane % 4 + 4 * (slot / 2)) * per + element};
}
constexpr Place place_in_b(int lane, int slot, int element, int per) {
  return {(lane % 4 + 4 * slot) * per + element, lane / 4};
}
// `index` counts elements: two per row of 8, then 8 rows further.
constexpr Place place_in_c(int lane, int index) {
  return {lane / 4 + 8 * (index / 2), lane % 4 * 2 + index % 2};
}

// Sum of c and k products, in the one order that every build uses: even and odd k in a chain of
// fused multiply-adds each, then both added.
float ordered_sum(const float* a, const float* b, int k, float c);

// The same as coarsely as hardware may: in steps of `step` products, all terms of a step are cut to
// 24 bits below the largest, and so is what the step leaves.
float coarse_sum(const float* a, const float* b, int k, int step, float c);

// D = A B + C with f32 accumulators, for m16n8k16 of f16 and bf16 and m16n8k8 of tf32, which all
// have the slots d 4, a 4, b 2, c 4. False if this build has no vector instructions for it.
enum class Operand : uint8_t { f16, bf16, tf32 };
template <Operand type>
bool multiply_fast(Warp&, const uint32_t* slots);

// The mma that a wgmma is for 8 columns, by the types of A and B: f16, bf16, tf32, the pairs of
// e4m3 and e5m2, the pairs of s8 and u8, and those again with saturation. packed: D is f16.
constexpr int kFirstInteger = 7, kIntegers = 4;
Handler wgmma_block(uint32_t kind, bool packed);

}  // namespace ptxvm
