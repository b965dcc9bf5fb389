// Integer knobs that choose kernels and partition their work, in the order of the table in
// knobs.cpp. A launch reads a knob once: another thread may set it meanwhile.
#pragma once
#include <cstdint>

namespace tokenmill {

enum class Knob : int {
  attention_shares,
  block_sparse_attention_shares,
  attention_decode_range,
  indexer_rows,
  best_match_words,
  nearest_floats,
  best_match_fill,
  hip_fill,
  attention_sm90,
  attention_sm90_backward,
  attention_sm90_section,
  attention_sm90_grid,
  attention_decode_sm90,
  attention_decode_sm90_tiles,
  block_sparse_attention_sm90,
  block_sparse_attention_sm90_backward,
  linear_attention_sm90,
  count,
};

int64_t knob(Knob k);

}  // namespace tokenmill
