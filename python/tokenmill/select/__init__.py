"""Selection of the keys to attend to."""

from ..reference.select.gumbel import gumbel_noise
from .attention_column_scores import attention_column_scores
from .attention_row_scores import attention_row_scores
from .block_pool_keys import block_pool_keys, block_pool_keys_update
from .hip_block_select import hip_block_select
from .indexer_kl_loss import indexer_kl_loss
from .indexer_topk_select import indexer_topk_select
from .kv_block_scores import kv_block_scores
from .kv_cache_append import kv_cache_append
from .kv_cache_compact import kv_cache_compact
from .massive_activations import massive_activations
from .paint_tokens import paint_tokens
from .query_similarity_gate import query_similarity_gate
from .token_select import token_select
from .topk_select import topk_select
from .visual_select import visual_select

__all__ = [
    "attention_column_scores",
    "attention_row_scores",
    "block_pool_keys",
    "block_pool_keys_update",
    "gumbel_noise",
    "hip_block_select",
    "indexer_kl_loss",
    "indexer_topk_select",
    "kv_block_scores",
    "kv_cache_append",
    "kv_cache_compact",
    "massive_activations",
    "paint_tokens",
    "query_similarity_gate",
    "token_select",
    "topk_select",
    "visual_select",
]
