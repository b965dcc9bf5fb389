// Summation in tensor cores. The hardware model follows measurements, since NVIDIA does not
// document it: F. Khattak and M. Mikaitis, "Accurate Models of NVIDIA Tensor Cores"
// (arXiv:2512.07004), and P. Xie et al., "MMA-Sim" (arXiv:2511.10909). Neither covers how mma.sp
// groups its products: here it adds the stored elements of A in steps of the same size. Zeros have
// no exponent here (MMA-Sim: -126).
#include <algorithm>
#include <climits>
#include <cmath>

#include "ptxvm/device.h"
#include "ptxvm/floats.h"
#include "ptxvm/tensor.h"

namespace ptxvm {
namespace {

// 2^e, for normal results.
double power_of_two(int e) { return std::bit_cast<double>(static_cast<uint64_t>(e + 1023) << 52); }

int exponent_of(float x, int least) { return std::max(std::ilogb(x), least); }

// Truncates to a fraction of `kept` bits. A sum beyond the range is infinite.
float cut(double x, int kept) {
  if (std::abs(x) >= 0x1p128) return std::copysign(std::bit_cast<float>(0x7f800000u), x);
  return std::bit_cast<float>(narrow<float>(x, Rounding::zero) & ~0u << (23 - kept));
}

}  // namespace

float ordered_sum(const float* a, const float* b, int k, float c) {
  float even = c, odd = 0;
  for (int i = 0; i < k; i += 2) {
    even = std::fma(a[i], b[i], even);
    odd = std::fma(a[i + 1], b[i + 1], odd);
  }
  return canonical(even + odd);
}

// A100 and other sm_8x chips add 8 products of 16 bits, Hopper and Blackwell 16; products of 8 bits
// are truncated at 13 bits on Ada and Hopper. On Hopper ptxas splits an 8-bit mma into two f16 mma.
Adder adder_of(Operand operand, bool of_wgmma) {
  const Device& chip = device();
  const bool is_ampere = chip.major == 8, is_hopper = chip.major == 9;
  const int bits = is_ampere ? 24 : 25;
  if (operand == Operand::tf32) return {is_ampere ? 4 : 8, bits, 23, false};
  if (operand != Operand::f8) return {is_ampere ? 8 : 16, bits, 23, false};
  if (is_ampere) return {16, 13, 13, false};
  if (is_hopper && !of_wgmma) return {16, bits, 23, true};
  return is_hopper ? Adder{32, 13, 13, false} : Adder{32, bits, 23, false};
}

namespace {

// Sum with a non-finite operand: the sign of its infinities, or NaN.
float sum_of_infinities(const float* a, const float* b, int k, float c) {
  bool plus = c > 0 && std::isinf(c), minus = c < 0 && std::isinf(c), none = std::isnan(c);
  for (int i = 0; i < k; ++i) {
    if (!std::isinf(a[i]) && !std::isinf(b[i])) {
      none |= std::isnan(a[i]) || std::isnan(b[i]);
      continue;
    }
    const float product = a[i] * b[i];  // NaN for infinity times 0 too
    none |= std::isnan(product);
    plus |= product > 0;
    minus |= product < 0;
  }
  if (none || (plus && minus)) return std::bit_cast<float>(kNaN32);
  return std::bit_cast<float>(plus ? 0x7f800000u : 0xff800000u);
}

}  // namespace

float hardware_sum(const float* a, const float* b, int k, const Adder& adder, float c, int least_a,
                   int least_b, bool half) {
  bool is_finite = std::isfinite(c);
  for (int i = 0; i < k; ++i) is_finite &= std::isfinite(a[i]) && std::isfinite(b[i]);
  if (!is_finite) return sum_of_infinities(a, b, k, c);
  const auto place = [&](int i) {
    return adder.in_halves ? i % (k / 2) / 2 * 4 + i % 2 + i / (k / 2) * 2 : i;
  };
  const int step = std::min(adder.step, adder.in_halves ? k / 2 : k);
  for (int begin = 0; begin < k; begin += step) {
    const int end = begin + step;
    int largest = c != 0 ? exponent_of(c, half ? -14 : -126) : INT_MIN;
    for (int i = begin; i < end; ++i) {
      const float x = a[place(i)], y = b[place(i)];
      if (x != 0 && y != 0)
        largest = std::max(largest, exponent_of(x, least_a) + exponent_of(y, least_b));
    }
    if (largest == INT_MIN) {
      c = 0;
      continue;
    }
    const double to_units = power_of_two(adder.bits - largest);
    auto sum = static_cast<int64_t>(c * to_units);
    for (int i = begin; i < end; ++i)
      sum += static_cast<int64_t>(double{a[place(i)]} * b[place(i)] * to_units);
    const double exact = static_cast<double>(sum) * power_of_two(largest - adder.bits);
    c = half ? to_float(Half{static_cast<uint16_t>(narrow<Half>(exact, Rounding::nearest))})
             : cut(exact, adder.kept);
    if (!std::isfinite(c)) return c;  // products are finite
  }
  return c;
}

}  // namespace ptxvm
