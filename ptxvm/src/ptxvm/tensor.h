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

// Sum of c and an even number k of products, in the one order that every build uses: even and odd k
// in a chain of fused multiply-adds each, then both added.
float ordered_sum(const float* a, const float* b, int k, float c);

enum class Operand : uint8_t { f16, bf16, tf32, f8 };

// How the device's tensor cores add (mma=hardware): `step` products and the running sum are aligned
// to the largest exponent among them, truncated `bits` bits below it and added exactly; the sum is
// truncated to a fraction of `kept` bits. The exponent of a product is the sum of its factors'
// exponents.
struct Adder {
  int step, bits, kept;
  bool in_halves;  // of every four k, two are added in a first pass over k, two in a second
};
Adder adder_of(Operand, bool of_wgmma);

// Sum as such an adder computes it. least: exponents of the smallest normal numbers of A and B.
// half: the accumulator is f16, to which each step rounds to nearest.
float hardware_sum(const float* a, const float* b, int k, const Adder&, float c, int least_a,
                   int least_b, bool half);

// D = A B + C with f32 accumulators, for m16n8k16 of f16 and bf16 and m16n8k8 of tf32, which all
// have the slots d 4, a 4, b 2, c 4. False if this build has no vector instructions for it.
template <Operand type>
bool multiply_fast(Warp&, const uint32_t* slots);

// B of a wgmma as f32, shared by the four warps: for every 8 columns and k, the even columns, then
// the odd ones.
struct Panel {
  alignas(64) float values[256 * 16];
};
// Stores a core matrix in the panel: 8 columns with 16 bytes of k each (`half` is its number along
// k) or, if transposed, 8 rows of k with 16 bytes of columns. False, here and below, if this build
// has no vector instructions for it.
bool widen_core(Operand, const char* const* from, bool transposed, bool negated, uint32_t column,
                uint32_t half, Panel&);
// D = A B + D, or A B, for the rows of a warp, with the summation order of multiply_fast. a: four
// fragments.
bool multiply_panel(Operand, Warp&, const uint32_t* d, const uint32_t* const* a, const Panel&,
                    uint32_t columns, bool accumulates);

// The mma equivalent to a wgmma for 8 columns, by the types of A and B: f16, bf16, tf32, the pairs
// of e4m3 and e5m2, the pairs of s8 and u8, and the latter again with saturation. packed: D is f16.
constexpr int kFirstInteger = 7, kIntegers = 4;
Handler wgmma_block(uint32_t kind, bool packed);

}  // namespace ptxvm
