// Exports what the header declares, whatever the default visibility.
#pragma GCC visibility push(default)
#include "ptxvm/host_api.h"
#pragma GCC visibility pop

#include <driver_types.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "ptxvm/check.h"
#include "ptxvm/counters.h"
#include "ptxvm/device.h"
#include "ptxvm/heap.h"
#include "ptxvm/log.h"
#include "ptxvm/reports.h"
#include "ptxvm/runtime.h"

namespace ptxvm {
namespace {

void set_option(const std::string& name, const std::string& value) {
  const auto number = [&](uint64_t low, uint64_t high) {
    uint64_t parsed = 0;
    if (!parse_literal(value, 64, parsed) || parsed < low || parsed > high)
      throw Fault("ptxvm_configure: " + name + ": must be from " + std::to_string(low) + " to " +
                  std::to_string(high) + "; got " + value);
    return parsed;
  };
  if (name == "check") {
    options.check = number(0, 1);
  } else if (name == "count") {
    options.count = number(0, 1);
  } else if (name == "approximate") {
    if (value != "-1" && value != "0" && value != "1")
      throw Fault("ptxvm_configure: approximate: must be -1, 0 or 1; got " + value);
    options.approximate = value == "-1" ? -1 : value == "1";
  } else if (name == "proxy") {
    if (value != "usual" && value != "strict")
      throw Fault("ptxvm_configure: proxy: must be usual or strict; got " + value);
    options.strict_proxy = value == "strict";
  } else if (name == "mma") {
    if (value != "exact" && value != "hardware")
      throw Fault("ptxvm_configure: mma: must be exact or hardware; got " + value);
    options.hardware_mma = value == "hardware";
  } else if (name == "seed") {
    options.seed = number(0, UINT64_MAX);
  } else if (name == "resident_blocks") {
    options.resident_blocks = static_cast<uint32_t>(number(1, 1 << 20));
  } else if (name == "fuel") {
    options.fuel = static_cast<uint32_t>(number(1, 1u << 31));
  } else if (name == "watchdog") {
    options.watchdog = number(0, UINT32_MAX);
  } else if (name == "on_fault") {
    if (value != "stop" && value != "report" && value != "collect")
      throw Fault("ptxvm_configure: on_fault: must be stop, report or collect; got " + value);
    options.go_on = value != "stop";
    options.quiet = value == "collect";
  } else if (name == "device") {
    if (!choose_device(value))
      throw Fault("ptxvm_configure: device: must be sm_80, sm_86, sm_89, sm_90a or sm_120; got " +
                  value);
  } else if (name == "async") {
    if (value == "latest") {
      options.async = Options::Async::latest;
    } else if (value == "earliest") {
      options.async = Options::Async::earliest;
    } else if (value.rfind("seed:", 0) == 0 &&
               parse_literal(value.substr(5), 64, options.async_seed)) {
      options.async = Options::Async::seeded;
    } else {
      throw Fault("ptxvm_configure: async: must be latest, earliest or seed:N; got " + value);
    }
  } else if (name == "order") {
    if (value == "forward")
      options.order = Options::Order::forward;
    else if (value == "reverse")
      options.order = Options::Order::reverse;
    else if (value == "seeded")
      options.order = Options::Order::seeded;
    else if (value == "weak")
      options.order = Options::Order::weak;
    else if (value == "sleepy")
      options.order = Options::Order::sleepy;
    else
      throw Fault("ptxvm_configure: order: must be forward, reverse, seeded, weak or sleepy; got " +
                  value);
  } else {
    throw Fault("ptxvm_configure: unknown option " + name);
  }
}

void configure(const std::string& settings) {
  for (const std::string& setting : split_list(settings)) {
    const size_t equals = setting.find('=');
    if (equals == std::string::npos)
      throw Fault("ptxvm_configure: '" + setting + "' is not of the form name=value");
    set_option(trim(setting.substr(0, equals)), trim(setting.substr(equals + 1)));
  }
}

std::string settings() {
  constexpr const char* kOrders[] = {"forward", "reverse", "seeded", "weak", "sleepy"};
  constexpr const char* kMoments[] = {"latest", "earliest", "seed:"};
  const auto moment = static_cast<size_t>(options.async);
  const std::pair<const char*, std::string> all[] = {
      {"check", std::to_string(options.check)},
      {"count", std::to_string(options.count)},
      {"approximate", std::to_string(options.approximate)},
      {"mma", options.hardware_mma ? "hardware" : "exact"},
      {"proxy", options.strict_proxy ? "strict" : "usual"},
      {"seed", std::to_string(options.seed)},
      {"resident_blocks", std::to_string(options.resident_blocks)},
      {"fuel", std::to_string(options.fuel)},
      {"watchdog", std::to_string(options.watchdog)},
      {"on_fault", options.quiet   ? "collect"
                   : options.go_on ? "report"
                                   : "stop"},
      {"device", device().name},
      {"async", kMoments[moment] + (moment == 2 ? std::to_string(options.async_seed) : "")},
      {"order", kOrders[static_cast<size_t>(options.order)]}};
  std::string text;
  for (const auto& [name, value] : all)
    text += (text.empty() ? "" : ",") + std::string(name) + "=" + value;
  return text;
}

// PTXVM_CHECK=1 and so on: the option names in capitals.
const bool configured = [] {
  for (const char* name :
       {"CHECK", "COUNT", "APPROXIMATE", "MMA", "PROXY", "SEED", "RESIDENT_BLOCKS", "FUEL",
        "WATCHDOG", "ORDER", "DEVICE", "ON_FAULT", "ASYNC"}) {
    const char* value = std::getenv(("PTXVM_" + std::string(name)).c_str());
    if (!value) continue;
    std::string lower = name;
    for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    try {
      set_option(lower, value);
    } catch (const Fault& fault) {
      std::fprintf(stderr, "PTXVM_%s: %s\n", name, fault.what());
      std::exit(2);
    }
  }
  return true;
}();

}  // namespace
}  // namespace ptxvm

using namespace ptxvm;

void ptxvm_register(const void* base, size_t bytes, int writable) {
  const std::lock_guard lock(runtime().mutex);
  register_memory(base, bytes, writable != 0);
}

void ptxvm_unregister(const void* base) {
  const std::lock_guard lock(runtime().mutex);
  unregister_memory(base);
}

void ptxvm_unregister_all(void) {
  Runtime& state = runtime();
  const std::lock_guard lock(state.mutex);
  unregister_all_memory();
  // The machine's own allocations stay registered.
  for (const auto& [base, allocation] : state.allocations)
    register_memory(base, allocation.bytes, true);
  register_heap();
  for (const auto& loaded : state.modules)
    for (const auto& [place, image] : loaded->images)
      if (image.module) register_variables(*image.module);
}

int ptxvm_configure(const char* settings) {
  const std::lock_guard lock(runtime().mutex);
  const Options before = options;
  const std::string device_before = device().name;
  try {
    configure(settings);
  } catch (const Fault& fault) {
    options = before;
    choose_device(device_before);
    fail(cudaErrorInvalidValue, fault.what());
    last_error(true);
    return -1;
  }
  return 0;
}

const char* ptxvm_options(void) {
  thread_local std::string text;
  const std::lock_guard lock(runtime().mutex);
  text = settings();
  return text.c_str();
}

void ptxvm_recover(void) { recover(); }

const char* ptxvm_last_report(void) {
  thread_local std::string text;
  text = std::exchange(last_report(), {});
  return text.c_str();
}

const char* ptxvm_last_finding(void) {
  thread_local std::string text;
  text = std::exchange(last_finding(), "null");
  return text.c_str();
}

const char* ptxvm_reports(void) {
  thread_local std::string text;
  const std::lock_guard lock(runtime().mutex);
  text = take_reports();
  return text.c_str();
}

const char* ptxvm_counters(void) {
  thread_local std::string text;
  const std::lock_guard lock(runtime().mutex);
  text = counters_json();
  return text.c_str();
}

void ptxvm_reset_counters(void) {
  const std::lock_guard lock(runtime().mutex);
  reset_counters();
}

void* ptxvm_load(const char* ptx) {
  const std::lock_guard lock(runtime().mutex);
  try {
    return load(ptx);
  } catch (const Fault& fault) {
    fail(cudaErrorInvalidPtx, fault.what());
    last_error(true);
    return nullptr;
  }
}

int ptxvm_launch(void* module, const char* name, const uint32_t grid[3], const uint32_t block[3],
                 uint32_t dynamic_shared, void** args) {
  const std::lock_guard lock(runtime().mutex);
  auto* const loaded = static_cast<LoadedModule*>(module);
  KernelRecord record{loaded, name};
  int error = prepare(&record);
  if (!error) {
    // A raw launch sets no attributes, so all dynamic shared memory of the device is allowed.
    const uint32_t limit = device().shared_per_block();
    record.kernel->max_dynamic_shared[device_position()] =
        limit - std::min(limit, record.kernel->static_shared);
    error = launch(&record, grid, block, dynamic_shared, args);
  }
  last_error(true);
  return error;
}

void ptxvm_unload(void* module) {
  const std::lock_guard lock(runtime().mutex);
  unload(static_cast<LoadedModule*>(module));
}

const char* ptxvm_demangled(const char* name) {
  thread_local std::string text;
  text = demangled(name);
  return text.c_str();
}

const char* ptxvm_kernels(void* module) {
  thread_local std::string text;
  const std::lock_guard lock(runtime().mutex);
  text = "{";
  for (const auto& [name, kernel] : static_cast<LoadedModule*>(module)->open().module->kernels) {
    text += (text.size() > 1 ? ", " : "") + quoted(name) + ": [";
    for (const Parameter& parameter : kernel->parameters)
      text += (text.back() == '[' ? "" : ", ") + std::string("{\"name\": ") +
              quoted(parameter.name) + ", \"type\": " + quoted(parameter.type) +
              ", \"count\": " + std::to_string(parameter.count) +
              ", \"bytes\": " + std::to_string(parameter.bytes) + "}";
    text += "]";
  }
  text += "}";
  return text.c_str();
}
