#include "cpu/isa.h"

#include <atomic>
#include <cstring>
#include <initializer_list>
#include <iterator>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tokenmill::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx"};

bool built(Isa isa) {
#define TOKENMILL_IS_BUILT(name, ...) \
  case Isa::name:                     \
    return true;
  switch (isa) {
    TOKENMILL_EACH_BUILT_ISA(TOKENMILL_IS_BUILT, )
    default:
      return false;
  }
}

// Linux saves the tile registers of a process that has asked for them; one without room for them on
// a signal stack is refused.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7, edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::avx512_amx:
      return machine_has(Isa::avx512_bf16) && may_use_tiles();
    case Isa::avx512_bf16:
      return __builtin_cpu_supports("avx512bf16") && machine_has(Isa::avx512);
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             machine_has(Isa::avx2);
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::baseline:
      return true;
  }
#endif
  return isa == Isa::baseline;
}

// vdpbf16ps does two multiply-adds per lane. On Zen 4 and 5 it issues as often as a float32 fma; on
// Intel cores once in the time of four (measured on Emerald Rapids), so that widening to float32 is
// faster there.
bool dots_pay() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

bool find(const char* name, Isa& out) {
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (std::strcmp(name, kNames[i]) == 0) {
      out = static_cast<Isa>(i);
      return built(out) && machine_has(out);
    }
  return false;
}

Isa initial() {
  Isa isa;
  const char* asked = std::getenv("TOKENMILL_CPU_ISA");
  return asked && find(asked, isa) ? isa : best_isa();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa best_isa() {
  Isa best = Isa::baseline;
  for (const Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::avx512_amx}) {
    const bool slower = isa == Isa::avx512_bf16 && best == Isa::avx512 && !dots_pay();
    if (built(isa) && machine_has(isa) && !slower) best = isa;
  }
  return best;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool select_isa(const char* name) {
  Isa isa = best_isa();
  if (*name && !find(name, isa)) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace tokenmill::cpu
