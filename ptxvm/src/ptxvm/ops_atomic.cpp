// atom and red. Lanes of a warp execute one after the other, lowest first.
#include <algorithm>

#include "ptxvm/floats.h"
#include "ptxvm/memory_ops.h"
#include "ptxvm/store_buffer.h"

namespace ptxvm {
namespace {

struct Add {
  template <typename T>
  static T apply(T old, T b, T) {
    return static_cast<T>(old + b);
  }
};
struct Min {
  template <typename T>
  static T apply(T old, T b, T) {
    return std::min(old, b);
  }
};
struct Max {
  template <typename T>
  static T apply(T old, T b, T) {
    return std::max(old, b);
  }
};
struct And {
  template <typename T>
  static T apply(T old, T b, T) {
    return old & b;
  }
};
struct Or {
  template <typename T>
  static T apply(T old, T b, T) {
    return old | b;
  }
};
struct Xor {
  template <typename T>
  static T apply(T old, T b, T) {
    return old ^ b;
  }
};
struct Exchange {
  template <typename T>
  static T apply(T, T b, T) {
    return b;
  }
};
struct CompareAndSwap {
  template <typename T>
  static T apply(T old, T b, T c) {
    return old == b ? c : old;
  }
};
struct Increment {
  template <typename T>
  static T apply(T old, T b, T) {
    return old >= b ? 0 : old + 1;
  }
};
struct Decrement {
  template <typename T>
  static T apply(T old, T b, T) {
    return old == 0 || old > b ? b : old - 1;
  }
};

// Global memory flushes subnormal numbers of f32 additions, shared memory does not (PTX ISA, atom).
template <bool flushes>
struct AddFloat {
  static float apply(float old, float b, float) {
    return flushes ? flush(canonical(flush(old) + flush(b))) : canonical(old + b);
  }
};
struct AddDouble {
  static double apply(double old, double b, double) { return canonical(old + b); }
};
template <typename H>
struct AddHalf {
  static H apply(H old, H b, H) { return nearest<H>(to_float(old) + to_float(b)); }
};
template <typename H>
struct Pair {
  H low, high;
};
template <typename H>
struct AddPair {
  static Pair<H> apply(Pair<H> old, Pair<H> b, Pair<H>) {
    return {AddHalf<H>::apply(old.low, b.low, {}), AddHalf<H>::apply(old.high, b.high, {})};
  }
};

// Slots: old values (atom only), address, b of every element, c (cas only).
template <typename T, typename Op, int vector>
void run_atomic(Warp& warp, const Instruction& in, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  const uint32_t* sources = in.slots + in.writes;
  lane_addresses(warp, sources[0], in.offset, in.flags & kWide, addresses);
  constexpr uint32_t bytes = sizeof(T) * vector;
  if (options.count) count_request(warp, in, space_of(in), addresses, mask, bytes, Traffic::atomic);
  resolve(warp, in, space_of(in), addresses, mask, bytes, Access::atomic);
  strong_accessed(warp, in, addresses, mask, true, true, vector, sizeof(T));
  if (is_weak()) {
    if (in.order & kReleases) order_stores(warp);
    settle_stores(warp, addresses, mask, bytes, true);
  }
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    char* memory = reinterpret_cast<char*>(addresses[i]);
    // A destination may be the register of a source: all sources are read before any is written.
    T old[vector], b[vector];
    std::memcpy(old, memory, sizeof old);
    for (int j = 0; j < vector; ++j) b[j] = lanes<const T>(warp, sources[1 + j])[i];
    const T c = in.reads > 1 + vector ? lanes<const T>(warp, sources[1 + vector])[i] : b[0];
    T result[vector];
    for (int j = 0; j < vector; ++j) result[j] = Op::apply(old[j], b[j], c);
    std::memcpy(memory, result, sizeof result);
    for (int j = 0; j < in.writes; ++j)
      if (in.slots[j] != kNoSlot) lanes<T>(warp, in.slots[j])[i] = old[j];
  }
}

// For generic addresses the space, and so the flushing rule of AddFloat, is known at run time only.
template <int vector>
void add_generic_float(Warp& warp, const Instruction& in, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(warp, in.slots[in.writes], in.offset, in.flags & kWide, addresses);
  Mask shared = 0;
  for (int i = 0; i < kLanes; ++i)
    shared |= Mask{(addresses[i] & kWindowMask) == kSharedWindow} << i;
  if (mask & ~shared) run_atomic<float, AddFloat<true>, vector>(warp, in, mask & ~shared);
  if (mask & shared) run_atomic<float, AddFloat<false>, vector>(warp, in, mask & shared);
}

template <typename T, typename Op>
Handler scalar() {
  return run_atomic<T, Op, 1>;
}

template <typename T, typename Op>
Handler vectors(int vector) {
  if (vector == 1) return run_atomic<T, Op, 1>;
  if (vector == 2) return run_atomic<T, Op, 2>;
  if constexpr (sizeof(T) <= 4)
    if (vector == 4) return run_atomic<T, Op, 4>;
  if constexpr (sizeof(T) <= 2)
    if (vector == 8) return run_atomic<T, Op, 8>;
  return nullptr;
}

Handler pick_add(const std::string& type, int vector, Space space) {
  if (type == "f32" && space == Space::generic && vector == 1) return add_generic_float<1>;
  if (type == "f32")
    return space == Space::shared || space == Space::cluster
               ? vectors<float, AddFloat<false>>(vector)
               : vectors<float, AddFloat<true>>(vector);
  if (type == "f16") return vectors<Half, AddHalf<Half>>(vector);
  if (type == "bf16") return vectors<BFloat, AddHalf<BFloat>>(vector);
  if (type == "f16x2") return vectors<Pair<Half>, AddPair<Half>>(vector);
  if (type == "bf16x2") return vectors<Pair<BFloat>, AddPair<BFloat>>(vector);
  if (vector != 1) return nullptr;
  if (type == "u32" || type == "s32") return scalar<uint32_t, Add>();
  if (type == "u64") return scalar<uint64_t, Add>();
  if (type == "f64") return scalar<double, AddDouble>();
  return nullptr;
}

template <typename Op>
Handler pick_order(const std::string& type) {
  if (type == "u32") return scalar<uint32_t, Op>();
  if (type == "s32") return scalar<int32_t, Op>();
  if (type == "u64") return scalar<uint64_t, Op>();
  if (type == "s64") return scalar<int64_t, Op>();
  return nullptr;
}

template <typename Op>
Handler pick_bits(const std::string& type) {
  if (type == "b32") return scalar<uint32_t, Op>();
  if (type == "b64") return scalar<uint64_t, Op>();
  return nullptr;
}

Handler pick(const std::string& op, const std::string& type, int vector, Space space) {
  if (op == "add") return pick_add(type, vector, space);
  if (vector != 1) return nullptr;
  if (op == "min") return pick_order<Min>(type);
  if (op == "max") return pick_order<Max>(type);
  if (op == "and") return pick_bits<And>(type);
  if (op == "or") return pick_bits<Or>(type);
  if (op == "xor") return pick_bits<Xor>(type);
  if (op == "exch") return pick_bits<Exchange>(type);
  if (op == "cas")
    return type == "b16" ? scalar<uint16_t, CompareAndSwap>() : pick_bits<CompareAndSwap>(type);
  if (op == "inc" && type == "u32") return scalar<uint32_t, Increment>();
  if (op == "dec" && type == "u32") return scalar<uint32_t, Decrement>();
  return nullptr;
}

template <bool returns>
void decode_atomic(Decoder& decoder, const Statement& statement, Instruction& in) {
  Words words = read_words(
      decoder, statement,
      {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec", "noftz", "v8"});
  std::string op;
  for (const char* name : {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"})
    if (statement.has(name)) op = name;
  if (statement.has("v8")) words.vector = 8;
  const bool half = words.type.find("f16") != std::string::npos;
  if (statement.has("noftz") != half)
    decoder.fail(".noftz belongs to f16 and bf16 types, and to no other");
  if (words.space != Space::generic && words.space != Space::global &&
      words.space != Space::shared && words.space != Space::cluster)
    decoder.fail("atomics need global, shared or generic addresses");
  if (words.vector > 1 && (words.space == Space::shared || words.space == Space::cluster))
    decoder.fail("vector atomics need global addresses");
  in.run = pick(op, words.type, words.vector, words.space);
  if (!in.run || (!returns && (op == "exch" || op == "cas")))
    decoder.fail("no ." + op + " for type ." + words.type);

  const auto& operands = statement.operands;
  const size_t expected = returns + 2u + (op == "cas") + words.cache_hint;
  if (operands.size() != expected) decoder.fail("wrong number of operands");
  const int bits = bits_of_type(words.type);
  const auto values = Decoder::elements(operands[returns + 1]);
  if (values.size() != static_cast<size_t>(words.vector))
    decoder.fail("the vector of registers does not have the size of the opcode");
  if (returns) {
    const auto old = Decoder::elements(operands[0]);
    if (old.size() != values.size()) decoder.fail("vectors of different sizes");
    for (const std::string& value : old) decoder.write(value, bits);
  }
  read_memory_operand(decoder, operands[returns], words, in);
  in.order |= kIsStrong;
  for (const std::string& value : values) decoder.read(value, bits);
  if (op == "cas") decoder.read(operands[3], bits);
}

}  // namespace

void add_atomics(OpcodeTable& table) {
  table["atom"] = decode_atomic<true>;
  table["red"] = decode_atomic<false>;
}

}  // namespace ptxvm
