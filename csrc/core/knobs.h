// Integer knobs that choose kernels and partition their work. A launch reads a knob once: another
// thread may set it meanwhile.
#pragma once
#include <cstdint>

// X(enumerator, name, standard, minimum, maximum); documented in python/tokenmill/_knobs.py.
#define TOKENMILL_KNOBS(X)                                                                 \
  X(attention_shares, "attention.shares", 4, 1, 64)                                        \
  X(block_sparse_attention_shares, "block_sparse_attention.shares", 4, 1, 64)              \
  X(attention_decode_range, "attention_decode.range", 256, 64, 4096)                       \
  X(indexer_rows, "indexer_topk_select.rows", 1024, 64, 4096)                              \
  X(best_match_words, "best_match.words", 65536, 4096, 1 << 20)                            \
  X(nearest_floats, "cluster_tokens.floats", 65536, 4096, 1 << 20)                         \
  X(best_match_fill, "best_match.fill", 2, 1, 16)                                          \
  X(hip_fill, "hip_block_select.fill", 1, 0, 16)                                           \
  X(attention_sm90, "attention.sm90", 1, 0, 1)                                             \
  X(attention_sm90_backward, "attention.sm90_backward", 1, 0, 1)                           \
  X(attention_sm90_section, "attention.sm90_section", 32, 0, 1024)                         \
  X(attention_sm90_grid, "attention.sm90_grid", 0, 0, 2)                                   \
  X(attention_decode_sm90, "attention_decode.sm90", 1, 0, 1)                               \
  X(attention_decode_sm90_tiles, "attention_decode.sm90_tiles", 256, 1, 1 << 30)           \
  X(block_sparse_attention_sm90, "block_sparse_attention.sm90", 1, 0, 1)                   \
  X(block_sparse_attention_sm90_backward, "block_sparse_attention.sm90_backward", 1, 0, 1) \
  X(linear_attention_sm90, "linear_attention.sm90", 1, 0, 1)

namespace tokenmill {

enum class Knob : int {
#define TOKENMILL_KNOB(knob, name, standard, minimum, maximum) knob,
  TOKENMILL_KNOBS(TOKENMILL_KNOB)
#undef TOKENMILL_KNOB
      count,
};

int64_t knob(Knob k);
const char* knob_name(Knob k);

}  // namespace tokenmill
