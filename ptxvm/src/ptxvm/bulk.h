// Shared by linear bulk copies (ops_bulk.cpp) and tensor bulk copies (ops_bulk_tensor.cpp).
#pragma once
#include <cstdint>
#include <string>

#include "ptxvm/async.h"
#include "ptxvm/decode.h"

namespace ptxvm {

// Slots: address in shared memory (a source or a destination), address in the other memory or of a
// tensor map, mbarrier, size, multicast mask, cache policy, coordinates.
enum BulkSlot : uint8_t { kNear, kFar, kSignal, kSize, kBlocks, kPolicy, kFirstCoordinate };
constexpr uint8_t kNearWide = 1, kFarWide = 2, kSignalWide = 4, kNearOwn = 8;  // Instruction::flags

// Instruction::variant. load: global memory to shared::cta or shared::cluster. send: own shared
// memory to shared memory of the cluster. store: shared to global memory. prefetch: into L2 only.
enum class Bulk : uint8_t { load, send, store, prefetch };

// Instruction::width: the reduction in the upper bits; the element type (linear copy) or the rank
// (tensor copy) in the lower bits.
constexpr uint8_t packed(Transfer::Combine combine, int low) {
  return static_cast<uint8_t>(static_cast<int>(combine) << 4 | low);
}
inline Transfer::Combine combine_of(const Instruction& in) {
  return static_cast<Transfer::Combine>(in.width >> 4);
}

// True if PTX has the reduction: it has fewer into shared memory than into global memory, and
// others for tensors.
enum class Reduced : uint8_t { shared, global, tensor };  // the destination
bool reduces(Transfer::Combine, Transfer::Element, Reduced);

// Modifiers of a bulk copy's opcode.
struct BulkForm {
  Bulk kind = Bulk::load;
  bool multicast = false, policy = false;
  bool near_own = false;  // kNear is in the own block: a source, or named .shared::cta
  Transfer::Combine combine = Transfer::Combine::copy;
};

// Parses the modifiers of any bulk copy; those in `own` are left to the caller.
BulkForm read_bulk_words(Decoder&, const Statement&, std::initializer_list<const char*> own);

// A bounds-checked place in the shared memory of a block of the cluster.
enum class Whose : uint8_t { any, own, other };  // blocks that it may be in
struct SharedPlace {
  Block* block;
  uint32_t offset;
};
SharedPlace shared_place(Warp&, const Instruction&, int lane, uint64_t address, uint32_t bytes,
                         uint32_t alignment, Whose, const char* what);
inline Whose near_block(const Instruction& in) {
  return in.flags & kNearOwn ? Whose::own : Whose::any;
}

// Sets the targets of a load: the block of `place`, or the blocks of the multicast mask in slot
// kBlocks.
void add_targets(Warp&, const Instruction&, int lane, const SharedPlace& place, Transfer&);

void decode_bulk_tensor(Decoder&, const Statement&, Instruction&);

}  // namespace ptxvm
