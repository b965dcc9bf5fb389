// Checks shared by the operators on block lists.
#pragma once
#include <bit>

#include "core/qkv.h"
#include "sparse/block_list.h"

namespace tokenmill {

constexpr int64_t kMaxListBlock = 128;

// log2 of a block size in queries or keys
inline int32_t check_block(const char* op, const char* name, int64_t value) {
  check(value >= 1 && value <= kMaxListBlock && std::has_single_bit(static_cast<uint64_t>(value)),
        op, name, Rule("must be a power of two up to ", kMaxListBlock), value);
  return std::countr_zero(static_cast<uint64_t>(value));
}

// indices: [B, heads, rows, K] or, packed, [heads, rows, K]; `fits`: they have the shape that
// `shape` names.
template <typename... Parts>
BlockList check_list(const char* op, const View& indices, const View& counts,
                     const Rule<Parts...>& shape, bool fits, const char* other, const View& first) {
  check(fits, op, "indices", shape, indices.sizes);
  const std::vector<int64_t> wanted(indices.sizes.begin(), indices.sizes.end() - 1);
  check(counts.sizes == wanted, op, "counts", Rule("must have shape ", wanted), counts.sizes);
  const std::pair<const char*, const View*> all[] = {{"indices", &indices}, {"counts", &counts}};
  for (auto [name, t] : all) {
    check(t->dtype == ScalarType::Int, op, name, "must be int32", t->dtype);
    check_last_contiguous(op, name, *t);
    check_device_of(op, name, *t, other, first);
  }
  const int64_t entries = indices.size(-2) * indices.size(-1);
  check(entries < int64_t{1} << 31, op, "indices", "must have fewer than 2^31 entries for a head",
        entries);
  const bool packed = indices.dim() == 3;
  return {indices.data<int32_t>(), counts.data<int32_t>(), packed ? 0 : indices.step(0),
          indices.step(-3),        indices.step(-2),       packed ? 0 : counts.step(0),
          counts.step(-2),         counts.step(-1),        indices.size(-3),
          indices.size(-2),        indices.size(-1)};
}

}  // namespace tokenmill
