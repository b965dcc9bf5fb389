// alloca, stacksave, stackrestore: a per-lane stack at the end of local memory. Its first 8 bytes
// hold the size in use; at the start of a block they are all ones, which counts as empty.
#include <bit>

#include "ptxvm/check.h"
#include "ptxvm/decode.h"
#include "ptxvm/parse.h"

namespace ptxvm {
namespace {

constexpr uint32_t kHead = 16, kStack = 4096;  // bytes

char* stack_of(Warp& warp, int lane) {
  const Block& block = *warp.block;
  const uint64_t thread = warp.index * uint64_t{kLanes} + static_cast<uint64_t>(lane);
  return block.local + thread * block.kernel->local_bytes + block.kernel->stack;
}

uint64_t used(const char* stack) {
  uint64_t bytes;
  std::memcpy(&bytes, stack, sizeof bytes);
  return bytes == ~uint64_t{0} ? 0 : bytes;
}

template <typename T>
void allocate(Warp& warp, const Instruction& in, Mask mask) {
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    char* const stack = stack_of(warp, lane);
    const auto alignment = static_cast<uint64_t>(in.offset);
    const uint64_t base = warp.block->kernel->stack + kHead;
    const uint64_t begin = (base + used(stack) + alignment - 1) / alignment * alignment - base;
    const uint64_t bytes = lanes<const T>(warp, in.slots[1])[lane];
    if (begin > kStack || bytes > kStack - begin)
      fault(warp, in, lane,
            "alloca of " + std::to_string(bytes) + " bytes: a stack has " + std::to_string(kStack) +
                ", " + std::to_string(begin) + " of them in use");
    const uint64_t end = begin + bytes;
    std::memcpy(stack, &end, sizeof end);
    lanes<T>(warp, in.slots[0])[lane] = static_cast<T>(base + begin);
  }
}

template <typename T, bool saves>
void move_top(Warp& warp, const Instruction& in, Mask mask) {
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    char* const stack = stack_of(warp, lane);
    T& top = lanes<T>(warp, in.slots[0])[lane];
    if (saves) {
      top = static_cast<T>(used(stack));
      continue;
    }
    const uint64_t bytes = top;
    if (bytes > used(stack)) fault(warp, in, lane, "stackrestore of what stacksave never gave");
    std::memcpy(stack, &bytes, sizeof bytes);
  }
}

void decode_stack(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& operands = statement.operands;
  const std::string& base = statement.opcode[0];
  const bool allocates = base == "alloca", saves = base == "stacksave";
  const std::string type = statement.opcode.size() == 2 ? statement.opcode[1] : "";
  uint64_t alignment = 8;
  if ((type != "u32" && type != "u64") || operands.empty() ||
      operands.size() > (allocates ? 3u : 1u) || (allocates && operands.size() < 2) ||
      (operands.size() == 3 &&
       (!parse_literal(operands[2], 32, alignment) || !std::has_single_bit(alignment))))
    decoder.fail("unknown form");
  const int bits = bits_of_type(type);
  in.offset = static_cast<int64_t>(alignment);
  if (allocates) {
    decoder.write(operands[0], bits);
    decoder.read(operands[1], bits);
    in.run = bits == 64 ? allocate<uint64_t> : allocate<uint32_t>;
  } else if (saves) {
    decoder.write(operands[0], bits);
    in.run = bits == 64 ? move_top<uint64_t, true> : move_top<uint32_t, true>;
  } else {
    decoder.read(operands[0], bits);
    in.run = bits == 64 ? move_top<uint64_t, false> : move_top<uint32_t, false>;
  }
  Kernel& kernel = decoder.kernel();
  if (kernel.stack) return;
  kernel.stack = (kernel.local_bytes + 15) / 16 * 16 + 16;  // never 0
  kernel.local_bytes = kernel.stack + kHead + kStack;
}

void do_nothing(Warp&, const Instruction&, Mask) {}

void decode_event(Decoder& decoder, const Statement& statement, Instruction& in) {
  uint64_t event = 0;
  if (statement.operands.size() != 1 || !parse_literal(statement.operands[0], 32, event))
    decoder.fail("unknown form");
  in.run = do_nothing;
}

}  // namespace

void add_stack(OpcodeTable& table) {
  table["alloca"] = table["stacksave"] = table["stackrestore"] = decode_stack;
  table["pmevent"] = decode_event;
}

}  // namespace ptxvm
