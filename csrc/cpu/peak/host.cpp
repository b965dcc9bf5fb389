// Introspection of the CPU backend, as operators without tensors: the selected instruction set, the
// measured peak of its multiply-add units, and rates of memory, exp and parallel regions.
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "core/check.h"
#include "core/stable.h"
#include "cpu/parallel.h"
#include "cpu/peak/params.h"

namespace tokenmill {
namespace {

// Returns the instruction set in use; `select` switches to another one ("" for the best).
std::string cpu_isa(std::optional<std::string> select) {
  if (select)
    check(cpu::select_isa(select->c_str()), "cpu_isa", "select",
          "must be '' or one of 'baseline', 'avx2', 'avx512', 'avx512_bf16', 'avx512_amx' that was "
          "built and that this machine has",
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

double wall_seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Parallel regions per second, with one idle worker per torch thread.
double region_rate(int64_t repeats) {
  constexpr int kRegions = 200;
  const int threads = cpu::num_threads();
  double best = 0;
  for (int64_t i = 0; i < repeats; ++i) {
    const double start = wall_seconds();
    for (int j = 0; j < kRegions; ++j) cpu::run_workers(threads, [](int, void*) {}, nullptr);
    const double rate = kRegions / (wall_seconds() - start);
    best = rate > best ? rate : best;
  }
  return best;
}

// Rate of one thread, best of `repeats` measurements of about 2 ms: bytes per second of passes over
// a working set ("read", "copy"), values per second ("exp"); or regions per second of all threads
// ("region").
double cpu_rate(std::string of, int64_t bytes, int64_t repeats) {
  constexpr int64_t kMaximum = int64_t{1} << 34;
  const bool memory = of == "read" || of == "copy";
  check(memory || of == "exp" || of == "region", "cpu_rate", "of",
        "must be 'read', 'copy', 'exp' or 'region'", of);
  check(!memory || (bytes > 0 && bytes % kRateStep == 0 && bytes <= kMaximum), "cpu_rate", "bytes",
        "must be a multiple of 2048 up to 2^34", bytes);
  check(repeats > 0, "cpu_rate", "repeats", "must be at least 1", repeats);
  if (of == "region") return region_rate(repeats);
  std::unique_ptr<float, decltype(&std::free)> data(nullptr, &std::free);
  if (memory) {
    data.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes))));
    check(data != nullptr, "cpu_rate", "bytes", "must be memory that this machine has", bytes);
    std::fill_n(data.get(), bytes / static_cast<int64_t>(sizeof(float)), 1.f);
  }
  constexpr int64_t kBytesOfAMeasurement = int64_t{1} << 26;
  const int64_t passes = memory ? std::max<int64_t>(1, kBytesOfAMeasurement / bytes) : 64;
  int64_t done = 0;
  float sink = 0;
  double best = 0;
  const RateParams p{of == "read"   ? RateParams::Of::read
                     : of == "copy" ? RateParams::Of::copy
                                    : RateParams::Of::exp,
                     data.get(),
                     bytes,
                     passes,
                     &done,
                     &sink};
  for (int64_t i = 0; i < repeats; ++i) {
    const double start = thread_seconds();
    cpu::rate(p);
    const double rate = static_cast<double>(done) / (thread_seconds() - start);
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

TOKENMILL_IMPL(CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_peak_flops", TORCH_BOX(&cpu_peak_flops));
  m.impl("cpu_rate", TORCH_BOX(&cpu_rate));
}

}  // namespace tokenmill
