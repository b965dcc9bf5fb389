"""Which keys to attend to."""

from ..reference.cache_scores import gumbel_noise
from .block_pool_keys import block_pool_keys, block_pool_keys_update
from .cache_compact import kv_cache_compact
from .column_scores import attention_column_scores
from .kv_block_scores import kv_block_scores
from .query_similarity_gate import query_similarity_gate
from .row_scores import attention_row_scores
from .sparse_decode import sparse_decode_attention
from .token_select import token_select
from .topk_select import topk_select

__all__ = [
    "attention_column_scores",
    "attention_row_scores",
    "block_pool_keys",
    "block_pool_keys_update",
    "gumbel_noise",
    "kv_block_scores",
    "kv_cache_compact",
    "query_similarity_gate",
    "sparse_decode_attention",
    "token_select",
    "topk_select",
]
