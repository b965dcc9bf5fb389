// ld and st.
#include <algorithm>
#include <type_traits>

#include "ptxvm/memory_ops.h"
#include "ptxvm/store_buffer.h"

namespace ptxvm {
namespace {

bool is_in(const std::string& word, std::initializer_list<const char*> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

bool are_consecutive(const uint64_t* addresses, uint64_t bytes) {
  uint64_t differs = 0;
  for (uint64_t i = 0; i < kLanes; ++i) differs |= addresses[i] ^ (addresses[0] + i * bytes);
  return !differs;
}

template <typename T>
T read_at(uint64_t address) {
  T value;
  std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof value);
  return value;
}

template <typename T>
void write_at(uint64_t address, const T& value) {
  std::memcpy(reinterpret_cast<void*>(address), &value, sizeof value);
}

// Four 32-bit words in one vector; lanes 4i to 4i + 3 of four registers form a 4 x 4 matrix, which
// a 16-byte access transposes.
using Quad = uint32_t __attribute__((vector_size(16)));

void transpose(Quad (&q)[4]) {
  const Quad a = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5);
  const Quad b = __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7);
  const Quad c = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5);
  const Quad d = __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
  q[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  q[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  q[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  q[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

// M: type in memory; R: unsigned type of the register, sign- or zero-extended as M requires.
template <typename M, typename R, int vector>
void load(Warp& warp, const Instruction& in, Mask mask) {
  constexpr uint32_t bytes = sizeof(M) * vector;
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(warp, in.slots[vector], in.offset, in.flags & kWide, addresses);
  if (options.count) count_request(warp, in, space_of(in), addresses, mask, bytes, Traffic::load);
  resolve(warp, in, space_of(in), addresses, mask, bytes,
          in.order & kIsStrong ? Access::strong_read : Access::read);
  if (in.order & kIsStrong)
    strong_accessed(warp, in, addresses, mask, true, false, vector, sizeof(M));
  if (is_weak()) settle_stores(warp, addresses, mask, bytes, false);

  alignas(64) R values[vector][kLanes];
  if constexpr (vector == 1) {
    if (are_consecutive(addresses, sizeof(M))) {
      alignas(64) M row[kLanes];
      std::memcpy(row, reinterpret_cast<const void*>(addresses[0]), sizeof row);
      for (int i = 0; i < kLanes; ++i) values[0][i] = static_cast<R>(row[i]);
    } else {
      for (int i = 0; i < kLanes; ++i) values[0][i] = static_cast<R>(read_at<M>(addresses[i]));
    }
  } else if constexpr (vector == 4 && sizeof(M) == 4 && sizeof(R) == 4) {
    for (int i = 0; i < kLanes; i += 4) {
      Quad q[4];
      for (int j = 0; j < 4; ++j) q[j] = read_at<Quad>(addresses[i + j]);
      transpose(q);
      for (int j = 0; j < 4; ++j) std::memcpy(&values[j][i], &q[j], sizeof q[j]);
    }
  } else {
    for (int i = 0; i < kLanes; ++i) {
      M row[vector];
      std::memcpy(row, reinterpret_cast<const void*>(addresses[i]), sizeof row);
      for (int j = 0; j < vector; ++j) values[j][i] = static_cast<R>(row[j]);
    }
  }
  for (int j = 0; j < vector; ++j)
    if (in.slots[j] != kNoSlot) assign(lanes<R>(warp, in.slots[j]), values[j], mask);
}

template <typename M, typename R, int vector>
void store(Warp& warp, const Instruction& in, Mask mask) {
  constexpr uint32_t bytes = sizeof(M) * vector;
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(warp, in.slots[0], in.offset, in.flags & kWide, addresses);
  if (options.count) count_request(warp, in, space_of(in), addresses, mask, bytes, Traffic::store);
  resolve(warp, in, space_of(in), addresses, mask, bytes,
          in.order & kIsStrong ? Access::strong_write : Access::write);
  if (in.order & kIsStrong)
    strong_accessed(warp, in, addresses, mask, false, true, vector, sizeof(M));
  const bool waits = is_weak();
  if (waits) {
    settle_stores(warp, addresses, mask, bytes, false);
    if (in.order & kReleases) order_stores(warp);
  }

  const R* values[vector];
  for (int j = 0; j < vector; ++j) values[j] = lanes<const R>(warp, in.slots[1 + j]);
  if (has_doubts()) [[unlikely]] {
    M all[kLanes][vector];
    const char* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < vector; ++j) all[i][j] = static_cast<M>(values[j][i]);
      rows[i] = reinterpret_cast<const char*>(all[i]);
    }
    stored(addresses, mask, rows, bytes);
  }
  if (mask == kFullMask && !waits) {
    if constexpr (vector == 1) {
      if (are_consecutive(addresses, sizeof(M))) {
        alignas(64) M row[kLanes];
        for (int i = 0; i < kLanes; ++i) row[i] = static_cast<M>(values[0][i]);
        std::memcpy(reinterpret_cast<void*>(addresses[0]), row, sizeof row);
        return;
      }
    } else if constexpr (vector == 4 && sizeof(M) == 4 && sizeof(R) == 4) {
      for (int i = 0; i < kLanes; i += 4) {
        Quad q[4];
        for (int j = 0; j < 4; ++j) std::memcpy(&q[j], values[j] + i, sizeof q[j]);
        transpose(q);
        for (int j = 0; j < 4; ++j) write_at(addresses[i + j], q[j]);
      }
      return;
    }
  }
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    M row[vector];
    for (int j = 0; j < vector; ++j) row[j] = static_cast<M>(values[j][i]);
    if (waits) [[unlikely]]
      defer_store(warp, i, addresses[i], row, sizeof row);
    else
      std::memcpy(reinterpret_cast<void*>(addresses[i]), row, sizeof row);
  }
}

template <bool loads, typename M, typename R>
Handler pick_vector(int vector) {
  static_assert(sizeof(R) >= sizeof(M));
  if constexpr (loads)
    return vector == 1 ? load<M, R, 1> : vector == 2 ? load<M, R, 2> : load<M, R, 4>;
  else
    return vector == 1 ? store<M, R, 1> : vector == 2 ? store<M, R, 2> : store<M, R, 4>;
}

template <bool loads, typename M>
Handler pick_register(int bits, int vector) {
  if (bits == 64) return pick_vector<loads, M, uint64_t>(vector);
  if constexpr (sizeof(M) <= 4)
    if (bits == 32) return pick_vector<loads, M, uint32_t>(vector);
  if constexpr (sizeof(M) <= 2)
    if (bits == 16) return pick_vector<loads, M, uint16_t>(vector);
  if constexpr (sizeof(M) == 1)
    if (bits == 8) return pick_vector<loads, M, uint8_t>(vector);
  return nullptr;
}

template <bool loads>
Handler pick(const std::string& type, int bits, int vector) {
  if (type == "s8" && loads) return pick_register<loads, int8_t>(bits, vector);
  if (type == "s16" && loads) return pick_register<loads, int16_t>(bits, vector);
  if (type == "s32" && loads) return pick_register<loads, int32_t>(bits, vector);
  switch (bits_of_type(type)) {
    case 8:
      return pick_register<loads, uint8_t>(bits, vector);
    case 16:
      return pick_register<loads, uint16_t>(bits, vector);
    case 32:
      return pick_register<loads, uint32_t>(bits, vector);
    case 64:
      return pick_register<loads, uint64_t>(bits, vector);
  }
  return nullptr;
}

// Width of the value registers, equal for all elements; it may exceed the type's.
int register_bits(Decoder& decoder, const std::vector<std::string>& values, const Words& words) {
  int bits = 0;
  for (const std::string& value : values) {
    const int width = decoder.width(value);
    if (width && bits && width != bits) decoder.fail("registers of different sizes in one vector");
    if (width) bits = width;
  }
  return bits ? bits : std::max(bits_of_type(words.type), 16);
}

template <bool loads>
void decode_access(Decoder& decoder, const Statement& statement, Instruction& in) {
  const Words words = read_words(decoder, statement);
  const size_t expected = 2 + words.cache_hint;
  if (statement.operands.size() != expected) decoder.fail("wrong number of operands");
  const std::string& memory = statement.operands[loads ? 1 : 0];
  const auto values = Decoder::elements(statement.operands[loads ? 0 : 1]);
  if (values.size() != static_cast<size_t>(words.vector))
    decoder.fail("the vector of registers does not have the size of the opcode");
  const int bits = register_bits(decoder, values, words);
  if (bits_of_type(words.type) * words.vector > 128) decoder.fail("more than 16 bytes per lane");
  if (loads) {
    for (const std::string& value : values) decoder.write(value, bits);
    read_memory_operand(decoder, memory, words, in);
  } else {
    read_memory_operand(decoder, memory, words, in);
    for (const std::string& value : values) decoder.read(value, bits);
  }
  in.width = static_cast<uint8_t>(bits_of_type(words.type) / 8);  // size of one value in memory
  if (words.cache_hint) decoder.read(statement.operands[2], 64);
  in.run = pick<loads>(words.type, bits, words.vector);
  if (!in.run) decoder.fail("type ." + words.type + " does not fit the register");
}

}  // namespace

Words read_words(Decoder& decoder, const Statement& statement,
                 std::initializer_list<const char*> own) {
  Words words;
  uint8_t scope = kGpu;
  const auto& parts = statement.opcode;
  for (size_t i = 1; i < parts.size(); ++i) {
    const std::string& word = parts[i];
    if (is_in(word, own)) continue;
    if (i + 1 == parts.size() && bits_of_type(word)) {
      words.type = word;
    } else if (word == "global") {
      words.space = Space::global;
    } else if (is_in(word, {"shared", "shared::cta"})) {
      words.space = Space::shared;
    } else if (word == "shared::cluster") {
      words.space = Space::cluster;
    } else if (word == "local") {
      words.space = Space::local;
    } else if (is_in(word, {"param", "param::entry", "param::func"})) {
      words.space = Space::param;
    } else if (word == "const") {
      words.space = Space::constant;
    } else if (is_in(word, {"v2", "v4"})) {
      words.vector = word[1] - '0';
    } else if (is_in(word, {"volatile", "relaxed", "mmio"})) {
      words.order |= kIsStrong;
    } else if (is_in(word, {"acquire", "release", "acq_rel"})) {
      words.order |=
          kIsStrong | (word == "release" ? 0 : kAcquires) | (word == "acquire" ? 0 : kReleases);
    } else if (is_in(word, {"cta", "cluster", "gpu", "sys"})) {
      scope = word == "cta" ? kCta : word == "cluster" ? kClusterScope : kGpu;
    } else if (word == "L2::cache_hint") {
      words.cache_hint = true;
    } else if (word == "nc") {
      words.order |= kReadOnly;
    } else if (!is_in(word, {"weak",
                             "ca",
                             "cg",
                             "cs",
                             "cv",
                             "lu",
                             "wb",
                             "wt",
                             "unified",
                             "L1::evict_normal",
                             "L1::evict_unchanged",
                             "L1::evict_first",
                             "L1::evict_last",
                             "L1::no_allocate",
                             "L2::evict_normal",
                             "L2::evict_first",
                             "L2::evict_last",
                             "L2::64B",
                             "L2::128B",
                             "L2::256B"})) {
      decoder.fail("unknown modifier ." + word);
    }
  }
  words.order |= scope;
  return words;
}

void read_memory_operand(Decoder& decoder, const std::string& operand, const Words& words,
                         Instruction& in) {
  const Address address = decoder.read_address(operand);
  if (!address.wide && (words.space == Space::generic || words.space == Space::global ||
                        words.space == Space::constant))
    decoder.fail("a 32-bit address of a space that needs 64 bits");
  in.offset = address.offset;
  in.variant = static_cast<uint8_t>(words.space);
  in.flags |= address.wide ? kWide : 0;
  in.order = words.order;
}

void add_memory(OpcodeTable& table) {
  table["ld"] = table["ldu"] = decode_access<true>;
  table["st"] = decode_access<false>;
  table["tensormap"] = decode_tensormap;
  add_atomics(table);
  add_copies(table);
  add_matrices(table);
  add_mbarrier(table);
  add_hints(table);
}

}  // namespace ptxvm
