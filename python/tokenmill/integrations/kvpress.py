"""kvpress presses on tokenmill's operators: KV cache eviction after the prompt.

These are ScorerPress subclasses, usable wherever one is accepted (``with press(model):``, the
pipeline, AdaKVPress and other wrappers). Attention weights are never materialised, so none needs
attn_implementation="eager" and the scores of H2O take linear memory. Ties go to the lower position,
and kept keys stay in order.

Written for kvpress 0.5.5, which needs transformers below 5.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._check import check, fail, needs
from ..select.attention_column_scores import attention_column_scores
from ..select.block_pool_keys import block_pool_keys
from ..select.kv_block_scores import kv_block_scores
from ..select.topk_select import topk_select
from ..tokens.gather_tokens import gather_tokens

try:
    from kvpress import ScorerPress
    from kvpress.utils import compute_n_kept, get_prerope_query_states
except ModuleNotFoundError as missing:
    raise needs("kvpress", missing) from missing

__all__ = ["ObservedAttentionPress", "QuestPress", "SnapKVPress", "StreamingLLMPress"]


@dataclass
class _Press(ScorerPress):
    """A press that selects keys with topk_select and moves them with gather_tokens.

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
        lowest = torch.finfo(scores.dtype).min  # NaN and -inf are selected last rather than never
        scores = scores.nan_to_num(nan=lowest, neginf=lowest)
        indices, _ = topk_select(scores.flatten(0, 1), kept, backend=self._backend)
        rows = gather_tokens(
            tuple(x.flatten(0, 1) for x in (keys, values)), indices, backend=self._backend
        )
        k, v = (x.unflatten(0, keys.shape[:2]) for x in rows)
        return k, v

    def score(
        self,
        module: torch.nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        return self._scores(module, hidden_states, keys, kwargs)

    def _scores(
        self, module: torch.nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        raise NotImplementedError

    @property
    def _name(self) -> str:
        return f"integrations.kvpress.{type(self).__name__}"

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
        """The last queries of the layer, rotated: [B, S, H, D]."""
        places = kwargs["position_embeddings"][0].shape[1]
        if last is None and hidden_states.shape[1] != places:
            rule = f"must have the {places} tokens of the call (ChunkPress hides their places)"
            fail(self._name, "hidden_states", rule, hidden_states.shape[1])
        newest = slice(None if last is None else -last, None)
        q = get_prerope_query_states(module, hidden_states[:, newest])
        cos, sin = (x[:, None, newest] for x in kwargs["position_embeddings"])
        rotated, rest = q[..., : cos.shape[-1]], q[..., cos.shape[-1] :]
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        q = torch.cat([rotated * cos + turned * sin, rest], dim=-1)
        return q.transpose(1, 2)

    def _columns(
        self,
        module: torch.nn.Module,
        q: Tensor,
        keys: Tensor,
        reduce: Literal["mean", "visible_mean"],
    ) -> Tensor:
        """Attention of queries [B, S, H, D] to each key, for each KV head."""
        return attention_column_scores(
            q, keys.transpose(1, 2), causal=True, reduce=reduce, head_reduce="group_mean",
            scale=getattr(module, "scaling", None), backend=self._backend,
        )  # fmt: skip

    def _check_window(self, window: int, tokens: int) -> None:
        check(window > 0, self._name, "window_size", "must be positive", window)
        rule = f"must be less than the number of tokens, {tokens}"
        check(window < tokens, self._name, "window_size", rule, window)


def _with_window(scores: Tensor, window: int) -> Tensor:
    """Appends higher scores for the newest tokens to scores [B, Hk, Sk - window]."""
    top = scores.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).amax()
    newest = torch.maximum(top + 1, top * 2).expand(*scores.shape[:2], window)
    return torch.cat([scores, newest], dim=-1)


@dataclass
class SnapKVPress(_Press):
    """SnapKV: the attention that the last queries of the prompt give to each key, smoothed.

    Args:
        compression_ratio: fraction of the keys to evict, 0 to 1.
        window_size: number of queries that vote; their keys are kept.
        kernel_size: number of positions over which scores are averaged, odd.
        backend: as in :func:`tokenmill.attention_column_scores`.

    Selects the keys of kvpress's SnapKVPress, up to ties and rounding, if the scale of the model is
    1/sqrt(head_dim), the only scale that kvpress supports. Under ChunkPress the queries of a chunk
    are rotated by the last positions of the prompt, as in kvpress.

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

    def _scores(
        self, module: torch.nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        self._check_window(self.window_size, hidden_states.shape[1])
        odd = self.kernel_size > 0 and self.kernel_size % 2 == 1
        check(odd, self._name, "kernel_size", "must be odd and positive", self.kernel_size)
        q = self._queries(module, hidden_states, kwargs, self.window_size)
        scores = self._columns(module, q, keys, "mean")[..., : -self.window_size]
        scores = torch.nn.functional.avg_pool1d(
            scores, self.kernel_size, stride=1, padding=self.kernel_size // 2
        )
        return _with_window(scores, self.window_size)


@dataclass
class ObservedAttentionPress(_Press):
    """H2O: the mean attention that each key receives from the queries that see it.

    Args:
        compression_ratio: fraction of the keys to evict, 0 to 1.
        backend: as in :func:`tokenmill.attention_column_scores`.

    Selects the keys of kvpress's ObservedAttentionPress, up to ties and rounding, without
    attn_implementation="eager" and its weight matrix.

    Paper: H2O (Zhang et al. 2023), section 4.

    Example:
        >>> from tokenmill.integrations.kvpress import ObservedAttentionPress
        >>> press = ObservedAttentionPress(compression_ratio=0.5)
    """

    compression_ratio: float = 0.0
    backend: str | None = None

    def _scores(
        self, module: torch.nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        q = self._queries(module, hidden_states, kwargs)
        return self._columns(module, q, keys, "visible_mean")


@dataclass
class StreamingLLMPress(_Press):
    """StreamingLLM: keeps the first and the newest keys.

    Args:
        compression_ratio: fraction of the keys to evict, 0 to 1.
        n_sink: number of first keys to keep.
        backend: as in :func:`tokenmill.topk_select`.

    Selects the keys of kvpress's StreamingLLMPress. The positions of the paper, ranks in the cache,
    require KeyRerotationPress around it.

    Paper: StreamingLLM (Xiao et al. 2024), section 3.2.

    Example:
        >>> from tokenmill.integrations.kvpress import StreamingLLMPress
        >>> press = StreamingLLMPress(compression_ratio=0.5, n_sink=4)
    """

    compression_ratio: float = 0.0
    n_sink: int = 4
    backend: str | None = None

    def _scores(
        self, module: torch.nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        length = keys.shape[2]
        check(self.n_sink >= 0, self._name, "n_sink", "must not be negative", self.n_sink)
        rule = f"must be less than the number of tokens, {length}"
        check(self.n_sink < length, self._name, "n_sink", rule, self.n_sink)
        scores = torch.arange(length, dtype=torch.float32, device=keys.device)
        scores[: self.n_sink] = length
        return scores.repeat(*keys.shape[:2], 1)  # wrappers write into the scores


@dataclass
class QuestPress(_Press):
    """Evicts by Quest's bound on the logits of a page.

    The score of a token is the score of its page: the highest bound over the last queries of the
    prompt and the query heads of a KV head. Quest itself evicts nothing and selects pages in each
    step; this is :class:`tokenmill.policies.Quest`.

    Args:
        compression_ratio: fraction of the keys to evict, 0 to 1.
        page_size: tokens per page.
        window_size: number of queries that vote; their keys are kept.
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

    def _scores(
        self, module: torch.nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: dict[str, Any]
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
