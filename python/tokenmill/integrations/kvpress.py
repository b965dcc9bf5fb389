"""Presses of kvpress on tokenmill's operators: what is evicted from a KV cache behind the prompt.

They are ScorerPress subclasses, for whatever takes one (``with press(model):``, the pipeline,
AdaKVPress and other wrappers). Weights of attention are never in memory, so that none needs
attn_implementation="eager" and the scores of H2O are linear in memory. Of equal scores the lower
position stays, and keys stay in the order of their positions.

Written for kvpress 0.5.5, which needs transformers below 5.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._check import check, fail
from ..select.attention_column_scores import attention_column_scores
from ..select.block_pool_keys import block_pool_keys
from ..select.kv_block_scores import kv_block_scores
from ..select.topk_select import topk_select
from ..tokens.gather_tokens import gather_tokens
from ._needs import needs

try:
    from kvpress import ScorerPress
    from kvpress.utils import compute_n_kept, get_prerope_query_states
except ModuleNotFoundError as missing:
    raise needs("kvpress", missing) from missing

__all__ = ["ObservedAttentionPress", "QuestPress", "SnapKVPress", "StreamingLLMPress"]


@dataclass
class _Press(ScorerPress):
    """A press whose keys topk_select chooses and gather_tokens moves.

    Hooks get keys and values as ``[B, Hk, Sk, D]``, hidden states ``[B, S, C]`` and in kwargs the
    arguments of the layer; scores are float32 ``[B, Hk, Sk]``.
    """

    def compress(
        self,
        module: torch.nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        if self.compression_ratio == 0:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs).float()
        kept = compute_n_kept(keys.shape[2], self.compression_ratio)
        lowest = torch.finfo(scores.dtype).min  # NaN and -inf are chosen last, not never
        scores = scores.nan_to_num(nan=lowest, neginf=lowest)
        indices, _ = topk_select(scores.flatten(0, 1), kept, backend=self._backend)
        rows = gather_tokens(
            tuple(x.flatten(0, 1) for x in (keys, values)), indices, backend=self._backend
        )
        k, v = (x.unflatten(0, keys.shape[:2]) for x in rows)
        return k, v

    @property
    def _backend(self) -> str | None:
        backend: str | None = getattr(self, "backend", None)
        return backend

    def _queries(
        self,
        module: torch.nn.Module,
        hidden_states: Tensor,
        kwargs: dict[str, Any],
        last: int | None = None,
    ) -> Tensor:
        """[B, S, H, D]: the last queries of the layer, rotated."""
        places = kwargs["position_embeddings"][0].shape[1]
        if last is None and hidden_states.shape[1] != places:
            op = f"integrations.kvpress.{type(self).__name__}"
            rule = f"must have the {places} tokens of the call (ChunkPress hides their places)"
            fail(op, "hidden_states", rule, hidden_states.shape[1])
        newest = slice(None if last is None else -last, None)
        q = get_prerope_query_states(module, hidden_states[:, newest])
        cos, sin = (x[:, None, newest] for x in kwargs["position_embeddings"])
        rotated, rest = q[..., : cos.shape[-1]], q[..., cos.shape[-1] :]
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        q = torch.cat([rotated * cos + turned * sin, rest], dim=-1)
        return q.transpose(1, 2)

    def _check_window(self, window: int, tokens: int) -> None:
        op = f"integrations.kvpress.{type(self).__name__}"
        check(window > 0, op, "window_size", "must be positive", window)
        if tokens <= window:
            fail(op, "window_size", f"must be less than the number of tokens, {tokens}", window)


def _with_window(scores: Tensor, window: int) -> Tensor:
    """Scores [B, Hk, Sk - window], and behind them higher ones of the newest tokens."""
    top = scores.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).amax()
    newest = torch.maximum(top + 1, top * 2).expand(*scores.shape[:2], window)
    return torch.cat([scores, newest], dim=-1)


@dataclass
class SnapKVPress(_Press):
    """SnapKV: the attention that the last queries of the prompt give to each key, smoothed.

    Args:
        compression_ratio: share of the keys that are evicted, 0 to 1.
        window_size: queries that vote; their keys stay.
        kernel_size: positions over which scores are averaged, odd.
        backend: as in :func:`tokenmill.attention_column_scores`.

    The keys are those of kvpress's SnapKVPress, up to ties and rounding, where the scale of the
    model is 1/sqrt(head dimension): theirs knows no other. Under ChunkPress the queries of a chunk
    are turned by the last positions of the prompt, as theirs are.

    Paper: SnapKV (Li et al. 2024), section 4.

    Example:
        >>> from tokenmill.integrations.kvpress import SnapKVPress
        >>> press = SnapKVPress(compression_ratio=0.5, window_size=16)
        >>> # with press(model): model(ids, past_key_values=cache)
    """

    compression_ratio: float = 0.0
    window_size: int = 64
    kernel_size: int = 5
    backend: str | None = None

    def score(
        self,
        module: torch.nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        self._check_window(self.window_size, hidden_states.shape[1])
        odd = self.kernel_size > 0 and self.kernel_size % 2 == 1
        op = "integrations.kvpress.SnapKVPress"
        check(odd, op, "kernel_size", "must be odd and positive", self.kernel_size)
        scores = attention_column_scores(
            self._queries(module, hidden_states, kwargs, self.window_size),
            keys.transpose(1, 2),
            causal=True,
            reduce="mean",
            head_reduce="group_mean",
            scale=getattr(module, "scaling", None),
            backend=self.backend,
        )[..., : -self.window_size]
        scores = torch.nn.functional.avg_pool1d(
            scores, self.kernel_size, stride=1, padding=self.kernel_size // 2
        )
        return _with_window(scores, self.window_size)


@dataclass
class ObservedAttentionPress(_Press):
    """H2O: the mean attention that each key receives from the queries that see it.

    Args:
        compression_ratio: share of the keys that are evicted, 0 to 1.
        backend: as in :func:`tokenmill.attention_column_scores`.

    The keys are those of kvpress's ObservedAttentionPress, up to ties and rounding, without
    attn_implementation="eager" and without its matrix of weights.

    Paper: H2O (Zhang et al. 2023), section 4.

    Example:
        >>> from tokenmill.integrations.kvpress import ObservedAttentionPress
        >>> press = ObservedAttentionPress(compression_ratio=0.5)
    """

    compression_ratio: float = 0.0
    backend: str | None = None

    def score(
        self,
        module: torch.nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        return attention_column_scores(
            self._queries(module, hidden_states, kwargs),
            keys.transpose(1, 2),
            causal=True,
            reduce="visible_mean",
            head_reduce="group_mean",
            scale=getattr(module, "scaling", None),
            backend=self.backend,
        )


@dataclass
class StreamingLLMPress(_Press):
    """StreamingLLM: the first and the newest keys stay.

    Args:
        compression_ratio: share of the keys that are evicted, 0 to 1.
        n_sink: first keys that stay.
        backend: as in :func:`tokenmill.topk_select`.

    The keys are those of kvpress's StreamingLLMPress. The positions of the paper, which are those
    in the cache, need KeyRerotationPress around it.

    Paper: StreamingLLM (Xiao et al. 2024), section 3.2.

    Example:
        >>> from tokenmill.integrations.kvpress import StreamingLLMPress
        >>> press = StreamingLLMPress(compression_ratio=0.5, n_sink=4)
    """

    compression_ratio: float = 0.0
    n_sink: int = 4
    backend: str | None = None

    def score(
        self,
        module: torch.nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        length = keys.shape[2]
        op = "integrations.kvpress.StreamingLLMPress"
        check(self.n_sink >= 0, op, "n_sink", "must not be negative", self.n_sink)
        if length <= self.n_sink:
            fail(op, "n_sink", f"must be less than the number of tokens, {length}", self.n_sink)
        scores = torch.arange(length, dtype=torch.float32, device=keys.device)
        scores[: self.n_sink] = length
        return scores.repeat(*keys.shape[:2], 1)  # wrappers write into scores


@dataclass
class QuestPress(_Press):
    """Quest's bound on the scores of a page, as a measure of what to evict.

    A token scores what its page does: the highest bound over the last queries of the prompt and the
    query heads of a key head. Quest itself evicts nothing: it reads other pages in each step, which
    is :class:`tokenmill.policies.Quest`.

    Args:
        compression_ratio: share of the keys that are evicted, 0 to 1.
        page_size: tokens of a page.
        window_size: queries that vote; their keys stay.
        backend: as in :func:`tokenmill.kv_block_scores`.

    Paper: Quest (Tang et al. 2024), section 3.3.

    Example:
        >>> from tokenmill.integrations.kvpress import QuestPress
        >>> press = QuestPress(compression_ratio=0.5, page_size=16)
    """

    compression_ratio: float = 0.0
    page_size: int = 16
    window_size: int = 16
    backend: str | None = None

    def score(
        self,
        module: torch.nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        self._check_window(self.window_size, hidden_states.shape[1])
        older = keys.transpose(1, 2)[:, : -self.window_size]
        boxes = block_pool_keys(older, self.page_size, mode="minmax", backend=self.backend)
        scores = kv_block_scores(
            self._queries(module, hidden_states, kwargs, self.window_size),
            boxes,
            scoring="minmax",
            block_k=self.page_size,
            block_q=self.window_size,
            q_reduce="max",
            head_reduce="group_max",
            backend=self.backend,
        ).squeeze(2)
        scores = scores.repeat_interleave(self.page_size, dim=-1)[..., : older.shape[1]]
        return _with_window(scores, self.window_size)
