"""tokenmill: attention beyond softmax, and selecting, gathering and merging tokens.

Every function has the same meaning on four backends: plain PyTorch ("reference"), native C++
("cpu"), CUDA ("cuda") and Triton ("triton"). `torch.ops.tokenmill.*` are the same operators for
other frameworks.
"""

import functools as _functools
import importlib as _importlib
import typing as _typing

from . import (
    _flops,
    _knobs,
    dense,
    linear,
    masks,
    reference,
    registry,
    select,
    sparse,
    testing,
    tokens,
)
from ._call import sharded as _sharded
from ._check import InputError
from ._explain import backends, explain
from ._info import build_info
from ._version import __version__
from .dense import (
    additive_attention,
    amplified_attention,
    attention,
    attention_decode,
    merge_attention_states,
    multi_subject_attention,
    pattention,
    pointer_argmax,
    redistributed_attention,
    reweighted_attention,
    sigmoid_attention,
    sink_calibrated_attention,
    soft_causal_attention,
)
from .linear import (
    causal_conv1d,
    causal_conv1d_decode,
    delta_attention,
    delta_attention_decode,
    lightning_attention,
    lightning_slopes,
    linear_attention,
    linear_attention_decode,
    titans_memory,
    titans_memory_decode,
)
from .select import (
    attention_column_scores,
    attention_row_scores,
    block_pool_keys,
    block_pool_keys_update,
    hip_block_select,
    indexer_kl_loss,
    indexer_topk_select,
    kv_block_scores,
    kv_cache_append,
    kv_cache_compact,
    massive_activations,
    paint_tokens,
    query_similarity_gate,
    token_select,
    topk_select,
    visual_select,
)
from .sparse import (
    bilevel_routing_attention,
    block_sparse_attention,
    core_context_attention,
    hip_attention,
    landmark_attention,
    landmark_decode,
    moba_attention,
    native_sparse_attention,
    sparse_decode_attention,
    transpose_block_list,
)
from .tokens import (
    best_match,
    bipartite_match,
    cluster_tokens,
    gather_fuse,
    gather_tokens,
    local_pool,
    mask_partition,
    merge_tokens,
    reconstruct_tokens,
    reposition_tokens,
    scatter_tokens,
    segment_reduce,
    subject_boxes,
    topk_partition,
    unmerge_tokens,
    video_prune,
)

__all__ = [
    "InputError",
    "__version__",
    "additive_attention",
    "amplified_attention",
    "attention",
    "attention_column_scores",
    "attention_decode",
    "attention_row_scores",
    "backends",
    "best_match",
    "bilevel_routing_attention",
    "bipartite_match",
    "block_pool_keys",
    "block_pool_keys_update",
    "block_sparse_attention",
    "build_info",
    "causal_conv1d",
    "causal_conv1d_decode",
    "cluster_tokens",
    "core_context_attention",
    "delta_attention",
    "delta_attention_decode",
    "dense",
    "evaluate",
    "explain",
    "gather_fuse",
    "gather_tokens",
    "hip_attention",
    "hip_block_select",
    "indexer_kl_loss",
    "indexer_topk_select",
    "kv_block_scores",
    "kv_cache_append",
    "kv_cache_compact",
    "landmark_attention",
    "landmark_decode",
    "lightning_attention",
    "lightning_slopes",
    "linear",
    "linear_attention",
    "linear_attention_decode",
    "local_pool",
    "mask_partition",
    "masks",
    "massive_activations",
    "merge_attention_states",
    "merge_tokens",
    "moba_attention",
    "multi_subject_attention",
    "native_sparse_attention",
    "nn",
    "paint_tokens",
    "papers",
    "pattention",
    "pointer_argmax",
    "policies",
    "query_similarity_gate",
    "reconstruct_tokens",
    "redistributed_attention",
    "reference",
    "registry",
    "reposition_tokens",
    "reweighted_attention",
    "scatter_tokens",
    "segment_reduce",
    "select",
    "sigmoid_attention",
    "sink_calibrated_attention",
    "soft_causal_attention",
    "sparse",
    "sparse_decode_attention",
    "subject_boxes",
    "testing",
    "titans_memory",
    "titans_memory_decode",
    "token_select",
    "tokens",
    "topk_partition",
    "topk_select",
    "transpose_block_list",
    "unmerge_tokens",
    "video_prune",
    "visual_select",
]

_flops.install([*registry.ops().values()])
_knobs.load()
_sharded.load = _functools.partial(_importlib.import_module, f"{__name__}.distributed.sharding")

if _typing.TYPE_CHECKING:
    from . import nn, papers, policies

    evaluate: _typing.Callable[..., list[_typing.Any]]  # evaluation imports this module
else:
    _LATER = ("nn", "papers", "policies")  # subpackages built on the operators: loaded at first use

    def __getattr__(name: str) -> object:
        if name in _LATER:
            return _importlib.import_module(f"{__name__}.{name}")
        if name == "evaluate":
            return _importlib.import_module(f"{__name__}.evaluation").evaluate
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
