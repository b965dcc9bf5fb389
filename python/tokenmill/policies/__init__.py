"""KV selection methods behind one interface, each a short composition of operators.

A policy is one layer's attention: `prefill` reads prompts, whole or in chunks (with full attention,
unless the method changes it, or with the attention of another policy, its `reader`), and `step`
lets the new tokens of each request, one or several, attend to the keys that the method selects. All
support GQA, requests of different lengths, padding on either side, dense or paged caches, and any
backend.

==========================  ==================================================  ======
policy                      keys attended to                                    cache
==========================  ==================================================  ======
:class:`FullAttention`      all
:class:`TokenSelect`        tokens with the most votes, sink, recent
:class:`TidalDecode`        tokens selected by an earlier layer
:class:`Quest`              pages with the largest bounds
:class:`HiP`                blocks found by a tree search, sink, recent
:class:`Indexer`            tokens scored highest by the model's indexer
:class:`RecycledAttention`  keys of the last full step, new tokens
:class:`RefreshKV`          keys of the last full step, replaced by new tokens
:class:`StreamingLLM`       sink, recent                                        evicts
:class:`H2O`                tokens with the most attention, recent              evicts
:class:`Keyformer`          the same, with noise                                evicts
:class:`SnapKV`             prompt keys chosen by its end, later tokens         evicts
:class:`RazorAttention`     all in retrieval heads; sink, recent, a mean        evicts
==========================  ==================================================  ======

Example:
    >>> import torch
    >>> from tokenmill import policies
    >>> k = v = torch.zeros(1, 4096, 2, 64)  # room for 4096 tokens, 2 key heads
    >>> layer = policies.TokenSelect(policies.KVCache(k, v.clone()), k=64, num_recent=64)
    >>> q, prompt = torch.randn(1, 3000, 8, 64), torch.randn(1, 3000, 2, 64)
    >>> out = layer.prefill(q, prompt, prompt)
    >>> out = layer.step(q[:, :1], prompt[:, :1], prompt[:, :1])
    >>> out.shape, layer.kept.tolist(), layer.bytes_read / (3001 * 1024)  # of full attention
    (torch.Size([1, 1, 8, 64]), [3001], 0.5853...)
"""

from .budget import at_budget
from .cache import KVCache
from .evicting import H2O, Keyformer, SnapKV, StreamingLLM
from .hip import HiP
from .indexer import Indexer
from .policy import FullAttention, Policy, stack
from .razor import RazorAttention
from .refresh import RefreshKV
from .retrieval import (
    choose_retrieval_heads,
    profile_repeated_tokens,
    profile_retrieval_heads,
)
from .selecting import Quest, RecycledAttention, TidalDecode
from .voting import TokenSelect

__all__ = [
    "H2O",
    "FullAttention",
    "HiP",
    "Indexer",
    "KVCache",
    "Keyformer",
    "Policy",
    "Quest",
    "RazorAttention",
    "RecycledAttention",
    "RefreshKV",
    "SnapKV",
    "StreamingLLM",
    "TidalDecode",
    "TokenSelect",
    "at_budget",
    "choose_retrieval_heads",
    "profile_repeated_tokens",
    "profile_retrieval_heads",
    "stack",
]
