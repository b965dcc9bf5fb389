#include "ptxvm/counters.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <map>

#include "ptxvm/check.h"
#include "ptxvm/log.h"

namespace ptxvm {
namespace {

constexpr uint64_t kSectorBytes = 32, kBankBytes = 4, kBanks = 32, kWaveBytes = kBanks * kBankBytes;

struct Requests {
  uint64_t requests = 0, lanes = 0, bytes = 0;
  uint64_t units = 0;  // sectors of global memory, waves of shared memory
  uint64_t ideal = 0;  // minimum number of units for these bytes
};

struct Totals {
  std::array<Requests, 5> global, shared;  // indexed by Traffic
  Requests bulk_global, bulk_shared;
  uint64_t local_requests = 0;
  uint64_t a_bytes = 0, b_bytes = 0;  // shared memory read by wgmma
};
Totals totals;
std::vector<std::string> launches;

const char* const kTraffic[] = {"load", "store", "atomic", "copy", "matrix"};

// Naturally aligned accesses of one size are equal or disjoint, so the number of distinct addresses
// in units of `unit` bytes measures distinct memory.
uint64_t distinct(const uint64_t* addresses, Mask mask, uint64_t unit) {
  std::array<uint64_t, kLanes> values;
  size_t count = 0;
  for (Mask rest = mask; rest; rest &= rest - 1)
    values[count++] = addresses[__builtin_ctz(rest)] / unit;
  std::sort(values.begin(), values.begin() + count);
  return std::unique(values.begin(), values.begin() + count) - values.begin();
}

// Lanes of one phase are served together; each access covers `bytes / 4` adjacent banks, and a bank
// delivers one word per wave, to any number of lanes. Rows of ldmatrix are not merged.
uint64_t waves_of_phase(const uint64_t* addresses, Mask mask, uint64_t bytes, bool merge_equal) {
  const uint64_t unit = std::max(bytes, kBankBytes), groups = kWaveBytes / unit;
  std::array<std::array<uint64_t, kLanes>, kBanks> seen;
  std::array<uint8_t, kBanks> count{};
  uint8_t most = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const uint64_t word = addresses[__builtin_ctz(rest)] / unit;
    auto& words = seen[word % groups];
    uint8_t& n = count[word % groups];
    if (merge_equal && std::find(words.begin(), words.begin() + n, word) != words.begin() + n)
      continue;
    words[n++] = word;
    most = std::max(most, n);
  }
  return most;
}

void count_shared(const uint64_t* addresses, Mask mask, uint64_t bytes, Traffic traffic) {
  Requests& r = totals.shared[static_cast<size_t>(traffic)];
  ++r.requests;
  r.lanes += __builtin_popcount(mask);
  r.bytes += __builtin_popcount(mask) * bytes;
  const int phases = std::max<uint64_t>(bytes / kBankBytes, 1), size = kLanes / phases;
  for (int phase = 0; phase < phases; ++phase) {
    const Mask lanes = (kFullMask >> (kLanes - size)) << (phase * size);
    if (!(mask & lanes)) continue;
    r.units += waves_of_phase(addresses, mask & lanes, bytes, traffic != Traffic::matrix);
    ++r.ideal;
  }
}

void count_global(const uint64_t* addresses, Mask mask, uint64_t bytes, Traffic traffic) {
  Requests& r = totals.global[static_cast<size_t>(traffic)];
  ++r.requests;
  r.lanes += __builtin_popcount(mask);
  r.bytes += __builtin_popcount(mask) * bytes;
  r.units += distinct(addresses, mask, kSectorBytes);
  const uint64_t unit = std::max(bytes, kBankBytes);
  r.ideal += (distinct(addresses, mask, unit) * unit + kSectorBytes - 1) / kSectorBytes;
}

enum Class {
  special,
  fp32,
  select,
  convert,
  integer,
  half,
  fp64,
  move,
  tensor,
  memory,
  warp,
  control
};
const char* const kClasses[] = {"special", "fp32", "select", "convert", "integer", "half",
                                "fp64",    "move", "tensor", "memory",  "warp",    "control"};

std::vector<std::string_view> parts_of(std::string_view opcode) {
  std::vector<std::string_view> parts;
  while (true) {
    const size_t dot = opcode.find('.');
    parts.push_back(opcode.substr(0, dot));
    if (dot == std::string_view::npos) return parts;
    opcode.remove_prefix(dot + 1);
  }
}

bool any_of(std::string_view word, std::initializer_list<std::string_view> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

bool is_float(std::string_view type) {
  return any_of(type, {"f16", "f16x2", "bf16", "bf16x2", "f32", "f64", "tf32"});
}

Class classify(const std::vector<std::string_view>& parts) {
  const std::string_view base = parts[0], type = parts.back();
  const auto has = [&](std::string_view word) {
    return std::find(parts.begin(), parts.end(), word) != parts.end();
  };
  const bool any_float = std::any_of(parts.begin() + 1, parts.end(), is_float);
  if (any_of(base, {"mov", "cvta"}) || (base == "ld" && (has("param") || has("const"))) ||
      (base == "st" && has("param")))
    return move;
  if (base == "mma" || (base == "wgmma" && has("mma_async")) || (base == "wmma" && has("mma")))
    return tensor;
  if (any_of(base, {"wmma", "ld", "ldu", "st", "atom", "red", "cp", "ldmatrix", "membar", "fence",
                    "prefetch", "prefetchu", "discard", "applypriority", "createpolicy", "isspacep",
                    "stmatrix", "mapa", "getctarank"}))
    return memory;
  if (any_of(base, {"shfl", "vote", "match", "redux", "activemask", "elect", "movmatrix"}))
    return warp;
  if (any_of(base, {"bra", "brx", "call", "ret", "exit", "bar", "barrier", "trap", "brkpt",
                    "nanosleep", "mbarrier", "wgmma", "setmaxnreg", "griddepcontrol"}))
    return control;
  if (any_of(base, {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos"}) ||
      (base == "div" && is_float(type)))
    return special;
  if (base == "cvt") return any_float ? convert : integer;
  if (base == "selp" || base == "slct" ||
      (any_of(base, {"min", "max", "setp", "set"}) && any_float))
    return select;
  if (type == "f64") return fp64;
  if (type == "f32") return fp32;
  return is_float(type) ? half : integer;
}

// Tensor-core time in units of one m16n8k16 with 16-bit operands. m8n8k4 of f16 is four products;
// elements that a sparse A does not store take no time.
double mma_weight(const std::vector<std::string_view>& parts) {
  if (parts[0] == "wgmma") {  // m64nNk..., a quarter of it per warp
    const std::string shape(parts[4]);
    return std::stod(shape.substr(4)) / 8;
  }
  double m = 0, n = 0, k = 0, bits = 16;
  bool is_sparse = false;
  for (const std::string_view part : parts) {
    if (part[0] == 'm' && part.size() > 5 && std::isdigit(static_cast<unsigned char>(part[1])))
      std::sscanf(std::string(part).c_str(), "m%lfn%lfk%lf", &m, &n, &k);
    if (any_of(part, {"s8", "u8", "e4m3", "e5m2"})) bits = 8;
    if (any_of(part, {"s4", "u4"})) bits = 4;
    if (part == "b1") bits = 1;
    if (part == "tf32") bits = 32;
    if (part == "f64") bits = 64;
    is_sparse |= part.starts_with("sp");
  }
  const bool is_quad = m == 8 && n == 8 && k == 4 && bits == 16;
  return m * n * k * bits / (16 * 8 * 16 * 16) * (is_sparse ? 0.5 : 1) * (is_quad ? 4 : 1);
}

std::string text(uint64_t value) { return std::to_string(value); }

std::string list(const uint32_t values[3]) {
  return "[" + text(values[0]) + ", " + text(values[1]) + ", " + text(values[2]) + "]";
}

std::string describe(const char* name, const Requests& r, const char* unit) {
  return std::string("\"") + name + "\": {\"requests\": " + text(r.requests) +
         ", \"lanes\": " + text(r.lanes) + ", \"bytes\": " + text(r.bytes) + ", \"" + unit +
         "\": " + text(r.units) + ", \"ideal\": " + text(r.ideal) + "}";
}

std::string describe(const std::array<Requests, 5>& rows, const Requests& bulk, const char* unit) {
  std::string json = "{";
  for (size_t i = 0; i < rows.size(); ++i)
    json += (i ? ", " : "") + describe(kTraffic[i], rows[i], unit);
  if (bulk.requests) json += ", " + describe("bulk", bulk, unit);
  return json + "}";
}

}  // namespace

std::string_view opcode_of(const Instruction& instruction) {
  std::string_view text = instruction.text;
  const char* blanks = " \t";
  if (!text.empty() && text[0] == '@') {
    text.remove_prefix(std::min(text.find_first_of(blanks), text.size()));
    text.remove_prefix(std::min(text.find_first_not_of(blanks), text.size()));
  }
  return text.substr(0, text.find_first_of(" \t;"));
}

void count_request(Warp&, const Instruction&, Space space, const uint64_t* addresses, Mask mask,
                   uint32_t bytes, Traffic traffic) {
  if (!options.count || !mask) return;
  if (space == Space::generic) {
    const uint64_t window = addresses[__builtin_ctz(mask)] & kWindowMask;
    space = window == kSharedWindow  ? Space::shared
            : window == kLocalWindow ? Space::local
            : window == kParamWindow ? Space::param
                                     : Space::global;
  }
  if (space == Space::shared || space == Space::cluster)
    count_shared(addresses, mask, bytes, traffic);
  if (space == Space::global) count_global(addresses, mask, bytes, traffic);
  if (space == Space::local) ++totals.local_requests;
}

void count_bulk(uint32_t global_bytes, uint32_t shared_bytes) {
  if (!options.count) return;
  const auto add = [](Requests& r, uint64_t bytes, uint64_t unit) {
    if (!bytes) return;
    ++r.requests;
    ++r.lanes;
    r.bytes += bytes;
    r.units += (bytes + unit - 1) / unit;
    r.ideal += (bytes + unit - 1) / unit;
  };
  add(totals.bulk_global, global_bytes, kSectorBytes);
  add(totals.bulk_shared, shared_bytes, kWaveBytes);
}

void count_operands(uint32_t a_bytes, uint32_t b_bytes) {
  totals.a_bytes += a_bytes;
  totals.b_bytes += b_bytes;
}

void start_counting(Kernel& kernel) {
  if (!options.count) return;
  kernel.issued.assign(kernel.code.size(), 0);
  kernel.active.assign(kernel.code.size(), 0);
  totals = Totals{};
}

void finish_counting(const Kernel& kernel, const uint32_t grid[3], const uint32_t block[3],
                     uint32_t dynamic_shared, bool complete) {
  if (!options.count) return;
  struct Executed {
    uint64_t issued = 0, active = 0;
  };
  std::array<Executed, std::size(kClasses)> classes;
  std::map<std::string, Executed, std::less<>> opcodes;
  uint64_t issued = 0, active = 0, barriers = 0;
  double mma = 0;
  for (size_t i = 0; i < kernel.code.size(); ++i) {
    const uint64_t times = kernel.issued[i], active_lanes = kernel.active[i];
    if (!times) continue;
    const std::string_view opcode = opcode_of(kernel.code[i]);
    const auto parts = parts_of(opcode);
    const Class kind = classify(parts);
    // The special-function unit processes the halves of a packed pair one after the other.
    const bool pair = kind == special && any_of(parts.back(), {"f16x2", "bf16x2"});
    classes[kind].issued += times;
    classes[kind].active += active_lanes * (pair ? 2 : 1);
    issued += times;
    active += active_lanes;
    if (kind == tensor && active_lanes) mma += mma_weight(parts) * (active_lanes / kLanes);
    if (active_lanes && any_of(parts[0], {"bar", "barrier"}) && parts.size() > 1 &&
        (parts[1] == "sync" || parts[1] == "red" || (parts[1] == "cta" && parts[2] != "arrive")))
      barriers += times;
    auto& row = opcodes[std::string(opcode)];
    row.issued += times;
    row.active += active_lanes;
  }
  char mma_text[32];
  snprintf(mma_text, sizeof mma_text, "%.10g", mma);
  std::string json =
      "{\"kernel\": " + quoted(kernel.name) + ", \"name\": " + quoted(kernel.title) +
      (complete ? "" : ", \"complete\": false") + ", \"grid\": " + list(grid) +
      ", \"block\": " + list(block) + ", \"dynamic_shared\": " + text(dynamic_shared) +
      ", \"static_shared\": " + text(kernel.static_shared) +
      ", \"local_bytes\": " + text(kernel.local_bytes) +
      ", \"registers\": " + text(kernel.registers) + ", \"instructions\": " + text(issued) +
      ", \"lanes\": " + text(active) +
      ", \"instructions_without_moves\": " + text(issued - classes[move].issued) +
      ", \"mma\": " + mma_text + ", \"barriers\": " + text(barriers) + ", \"classes\": {";
  for (size_t i = 0; i < classes.size(); ++i)
    json += std::string(i ? ", " : "") + "\"" + kClasses[i] +
            "\": {\"instructions\": " + text(classes[i].issued) +
            ", \"lanes\": " + text(classes[i].active) + "}";
  json += "}, \"shared\": " + describe(totals.shared, totals.bulk_shared, "waves") +
          ", \"global\": " + describe(totals.global, totals.bulk_global, "sectors") +
          ", \"local_requests\": " + text(totals.local_requests);
  if (totals.b_bytes)
    json += ", \"wgmma\": {\"a_bytes\": " + text(totals.a_bytes) +
            ", \"b_bytes\": " + text(totals.b_bytes) + "}";
  json += ", \"opcodes\": {";
  bool first = true;
  for (const auto& [opcode, row] : opcodes) {
    json += std::string(first ? "" : ", ") + "\"" + opcode +
            "\": {\"instructions\": " + text(row.issued) + ", \"lanes\": " + text(row.active) + "}";
    first = false;
  }
  launches.push_back(json + "}}");
}

std::string counters_json() {
  std::string json = "{\"launches\": [";
  for (size_t i = 0; i < launches.size(); ++i) json += (i ? ",\n" : "\n") + launches[i];
  return json + "\n]}";
}

const std::string& last_launch() { return launches.back(); }

void reset_counters() { launches.clear(); }

}  // namespace ptxvm
