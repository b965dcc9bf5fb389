// Bulk copies of boxes of a tensor described by a tensor map. Elements of the box outside the
// tensor are zero or NaN in shared memory, and are not written in global memory.
#include <algorithm>

#include "ptxvm/bulk.h"
#include "ptxvm/memory_ops.h"
#include "ptxvm/tensor_map.h"

namespace ptxvm {
namespace {

using Combine = Transfer::Combine;

constexpr uint32_t kAlignment = 128;  // bytes; alignment of a box in shared memory
constexpr uint32_t kUnit = 16;        // bytes that a swizzle keeps contiguous

// Indexed by Transfer::Element.
const char* const kNames[] = {"u8 or u16", "u32",  "s32", "u64",  "s64",
                              "f16",       "bf16", "f32", "tf32", "f64"};

TensorMap map_at(Warp& warp, const Instruction& in, int lane, uint64_t address) {
  uint64_t words[kTensorMapWords];
  if (address % 64)
    fault(warp, in, lane, "the address of a tensor map must be a multiple of 64 bytes");
  for (uint32_t i = 0; i < kTensorMapWords; i += 8)
    std::memcpy(words + i,
                access(warp, in, Space::generic, address + i * 8, lane, 64, Access::strong_read),
                64);
  TensorMap map;
  if (const std::string why = unpack(words, map); !why.empty()) fault(warp, in, lane, why);
  const int rank = in.width & 15;
  if (map.rank != rank)
    fault(warp, in, lane,
          "a tensor map of " + std::to_string(map.rank) + " dimensions where the opcode has " +
              std::to_string(rank));
  return map;
}

// Splits a box into pieces, each either inside or outside of the tensor and contiguous under the
// swizzle.
class Box {
 public:
  Box(Warp& warp, const Instruction& in, int lane, const TensorMap& map)
      : warp_(warp), in_(in), lane_(lane), map_(map) {
    for (int d = 0; d < map.rank; ++d)
      first_[d] = lanes<const int32_t>(warp, in.slots[kFirstCoordinate + d])[lane];
  }

  uint64_t bytes() const {
    uint64_t product = map_.element_bytes;
    for (int d = 0; d < map_.rank; ++d) product *= map_.box[d];
    return product;
  }

  // act(offset in shared memory, host address or 0, bytes)
  template <typename Act>
  void visit(const SharedPlace& place, Access kind, Act act) const {
    const uint32_t row = map_.box[0] * map_.element_bytes;
    uint32_t at[kMaxRank] = {};
    for (uint32_t offset = place.offset; offset < place.offset + bytes(); offset += row) {
      visit_row(offset, row, at, kind, act);
      for (int d = 1; d < map_.rank && ++at[d] == map_.box[d]; ++d) at[d] = 0;
    }
  }

 private:
  template <typename Act>
  void visit_row(uint32_t offset, uint32_t row, const uint32_t* at, Access kind, Act act) const {
    uint64_t address = map_.base;
    bool inside = true;
    for (int d = 1; d < map_.rank; ++d) {
      const int64_t x = int64_t{first_[d]} + at[d];
      inside = inside && x >= 0 && x < map_.extents[d];
      address += static_cast<uint64_t>(x) * map_.strides[d];
    }
    // Part of the row inside the tensor, in bytes.
    const int64_t size = map_.element_bytes, x = first_[0];
    const auto clamp = [&](int64_t value) { return std::clamp<int64_t>(value, 0, row); };
    const int64_t begin = inside ? clamp(-x * size) : row;
    const int64_t end = inside ? std::max(clamp((map_.extents[0] - x) * size), begin) : row;
    address += static_cast<uint64_t>(x * size);
    if (begin < end)
      require_global(warp_, in_, lane_, address + static_cast<uint64_t>(begin),
                     static_cast<uint32_t>(end - begin), 1, kind);
    const auto add = [&](int64_t from, int64_t to, bool has) {
      while (from < to) {
        int64_t stop = to;
        if (map_.swizzle) stop = std::min(to, (from / kUnit + 1) * kUnit);
        act(static_cast<uint32_t>(swizzled(offset + static_cast<uint64_t>(from), map_.swizzle)),
            has ? address + static_cast<uint64_t>(from) : 0, static_cast<uint32_t>(stop - from));
        from = stop;
      }
    };
    add(0, begin, false);
    add(begin, end, true);
    add(end, row, false);
  }

  Warp& warp_;
  const Instruction& in_;
  int lane_;
  const TensorMap& map_;
  int32_t first_[kMaxRank] = {};
};

void load_box(Warp& warp, const Instruction& in, int lane, const Box& box, uint64_t near,
              Transfer transfer) {
  const SharedPlace place = shared_place(warp, in, lane, near, transfer.bytes, kAlignment,
                                         near_block(in), "destination of a bulk copy of a tensor");
  box.visit(place, Access::read, [&](uint32_t offset, uint64_t host, uint32_t bytes) {
    transfer.pieces.push_back({offset, host, bytes});
  });
  add_targets(warp, in, lane, place, transfer);
  count_bulk(transfer.bytes, transfer.bytes * static_cast<uint32_t>(transfer.targets.size()));
  start_transfer(warp, std::move(transfer));
}

void store_box(Warp& warp, const Instruction& in, int lane, const Box& box, uint64_t near,
               Transfer transfer) {
  const SharedPlace place = shared_place(warp, in, lane, near, transfer.bytes, kAlignment,
                                         near_block(in), "source of a bulk copy of a tensor");
  const Access kind = transfer.combine == Combine::copy ? Access::write : Access::atomic;
  box.visit(place, kind, [&](uint32_t offset, uint64_t host, uint32_t bytes) {
    if (!host) return;
    transfer.pieces.push_back(
        {host, reinterpret_cast<uint64_t>(place.block->shared + offset), bytes});
  });
  transfer.to_global = true;
  transfer.group = warp.bulk_groups[lane];
  count_bulk(transfer.bytes, transfer.bytes);
  start_transfer(warp, std::move(transfer));
}

void run_tensor(Warp& warp, const Instruction& in, Mask mask) {
  const Bulk kind = static_cast<Bulk>(in.variant);
  alignas(64) uint64_t near[kLanes], far[kLanes];
  if (kind != Bulk::prefetch)
    lane_addresses(warp, in.slots[kNear], in.offset, in.flags & kNearWide, near);
  lane_addresses(warp, in.slots[kFar], in.offset2, in.flags & kFarWide, far);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const TensorMap map = map_at(warp, in, lane, far[lane]);
    if (kind == Bulk::prefetch) continue;
    const Box box(warp, in, lane, map);
    Transfer transfer;
    transfer.from = &in;
    transfer.lane = lane;
    if (box.bytes() > warp.block->shared_bytes)
      fault(warp, in, lane,
            "a box of " + std::to_string(box.bytes()) +
                " bytes: the shared memory of the block has " +
                std::to_string(warp.block->shared_bytes));
    transfer.bytes = static_cast<uint32_t>(box.bytes());
    transfer.combine = combine_of(in);
    transfer.element = map.element;
    transfer.fill_nan = map.fill_nan;
    if (!reduces(transfer.combine, transfer.element, Reduced::tensor))
      fault(warp, in, lane,
            "no such reduction for a tensor of " +
                std::string(kNames[static_cast<int>(map.element)]));
    if (kind == Bulk::load)
      load_box(warp, in, lane, box, near[lane], std::move(transfer));
    else
      store_box(warp, in, lane, box, near[lane], std::move(transfer));
  }
}

}  // namespace

void decode_bulk_tensor(Decoder& decoder, const Statement& statement, Instruction& in) {
  if (statement.has("im2col") || statement.has("im2col_no_offs") || statement.has("im2col::w") ||
      statement.has("im2col::w::128"))
    decoder.fail("im2col is not supported");
  int rank = 0;
  for (int d = 1; d <= kMaxRank; ++d)
    if (statement.has((std::to_string(d) + "d").c_str())) rank = d;
  const std::string dimensions = std::to_string(rank) + "d";
  const BulkForm form = read_bulk_words(decoder, statement, {"tensor", "tile", dimensions.c_str()});
  if (!rank || form.kind == Bulk::send) decoder.fail("unknown form of a bulk copy of a tensor");
  const bool loads = form.kind == Bulk::load, prefetches = form.kind == Bulk::prefetch;
  const auto& operands = statement.operands;
  const size_t addresses = loads ? 3 : prefetches ? 1 : 2;
  if (operands.size() != addresses + form.multicast + form.policy)
    decoder.fail("wrong number of operands");
  in.variant = static_cast<uint8_t>(form.kind);
  in.flags = form.near_own ? kNearOwn : 0;
  in.width = packed(form.combine, rank);
  in.run = run_tensor;

  // "[map, {x, y}]"
  const std::string& tensor = operands[loads ? 1 : 0];
  const auto parts = Decoder::elements(tensor.size() > 2 && tensor.front() == '['
                                           ? "{" + tensor.substr(1, tensor.size() - 2) + "}"
                                           : tensor);
  if (parts.size() != 2) decoder.fail("'" + tensor + "' is no tensor map with coordinates");
  const auto coordinates = Decoder::elements(parts[1]);
  if (coordinates.size() != static_cast<size_t>(rank))
    decoder.fail("the vector of coordinates does not have the size of the opcode");
  if (prefetches) {
    decoder.skip();
  } else {
    const Address near = decoder.read_address(operands[loads ? 0 : 1]);
    in.offset = near.offset;
    if (near.wide) in.flags |= kNearWide;
  }
  const Address map = decoder.read_address("[" + parts[0] + "]");
  if (!map.wide) decoder.fail("a 32-bit address of a tensor map");
  in.offset2 = map.offset;
  in.flags |= kFarWide;
  if (loads) {
    const Address signal = decoder.read_address(operands[2]);
    in.target = static_cast<uint32_t>(signal.offset);
    if (signal.wide) in.flags |= kSignalWide;
  } else {
    decoder.skip();
  }
  decoder.skip();  // the size
  form.multicast ? decoder.read(operands[addresses], 16) : decoder.skip();
  form.policy ? decoder.read(operands.back(), 64) : decoder.skip();
  for (const std::string& coordinate : coordinates) decoder.read(coordinate, 32);
}

}  // namespace ptxvm
