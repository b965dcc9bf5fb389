// Introspection of the CPU backend, as operators without tensors: the chosen instruction set and
// the measured peak of its multiply-add units.
#include <time.h>

#include "core/check.h"
#include "core/stable.h"
#include "cpu/peak/params.h"

namespace tokenmill {
namespace {

// The instruction set in use; `select` asks for another one ("" for the best).
std::string cpu_isa(std::optional<std::string> select) {
  if (select)
    check(
        cpu::select_isa(select->c_str()), "cpu_isa", "select",
        "must be '' or one of 'baseline', 'avx2', 'avx512', 'avx512_bf16' that was built and that "
        "this machine has",
        *select);
  return cpu::isa_name(cpu::current_isa());
}

double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Floating-point operations per second of one thread, best of `repeats` measurements of about 5 ms.
double cpu_peak_flops(std::string dtype, int64_t repeats) {
  check(dtype == "float32" || dtype == "bfloat16", "cpu_peak_flops", "dtype",
        "must be 'float32' or 'bfloat16'", dtype);
  int64_t flops = 0;
  float sink = 0;
  double best = 0;
  PeakParams p{dtype == "bfloat16" ? DType::bfloat16 : DType::float32, 1 << 19, &flops, &sink};
  for (int64_t i = 0; i < repeats; ++i) {
    const double start = thread_seconds();
    cpu::peak(p);
    const double rate = static_cast<double>(flops) / (thread_seconds() - start);
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

TOKENMILL_IMPL(CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_peak_flops", TORCH_BOX(&cpu_peak_flops));
}

}  // namespace tokenmill
