// Attention of queries to listed keys. Free of torch.
#pragma once
#include "attention/params.h"
#include "sparse/block_list.h"

namespace tokenmill {

struct ListedAttention {
  AttentionParams attention;  // softmax with softcap; no other score_mod, no window
  BlockList list;

  // Number of query heads that share a list and keys: heads h with the same h / heads_together().
  TOKENMILL_HOST_DEVICE int64_t heads_together() const {
    return list.heads > attention.kv_heads ? 1 : attention.heads / attention.kv_heads;
  }
  TOKENMILL_HOST_DEVICE int64_t kv_head(int64_t query_head) const {
    return query_head / (attention.heads / attention.kv_heads);
  }
  TOKENMILL_HOST_DEVICE int64_t list_head(int64_t query_head) const {
    return list.heads == 1 ? 0 : list.heads == attention.heads ? query_head : kv_head(query_head);
  }
};

}  // namespace tokenmill
