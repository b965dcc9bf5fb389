"""attention over a sequence sharded over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Unpack

from .._call.autocast import Autocast
from .._call.choose import choose
from .._check import (
    as_number,
    check,
    check_bool,
    check_choice,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_qkv,
    check_tensor,
    check_text,
)
from ..dense.attention import SPEC, lower
from ..dense.attention_options import AttentionOptions
from ..dense.terms import as_window, check_return_lse
from ._allgather import gathered_attention
from ._call import Call
from ._group import Group, records_gradients
from ._ring import ring_attention
from ._ulysses import head_attention, heads_divide
from .plan import cheapest
from .sequence import Order, layout_of_shard

Schedule = Literal["auto", "ring", "allgather", "ulysses"]
SCHEDULES = ("ring", "allgather", "ulysses")
OP = "distributed.attention"
# Only for whole sequences: these depend on positions or pairs.
WHOLE = ("bias", "mask", "alibi_slopes", "alibi_grid", "post_decay")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    schedule: Schedule = "auto",
    order: Order = "contiguous",
    length: int | None = None,
    sizes: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact self-attention of a sequence whose tokens are sharded over ranks.

    Each rank passes the queries, keys and values of its own tokens, as sharded by
    :func:`shard_sequence`, and gets their rows of :func:`tokenmill.attention` over the whole
    sequence. Schedules:

    - "ring": keys and values travel from rank to rank, overlapped with computation on the current
      shard; memory of one shard. Partial results are merged in float32, softmax by its lse, kinds
      with normalize="sum" by numerators and row sums, others by a sum.
    - "allgather": every rank gathers all keys and values; used for packed sequences.
    - "ulysses": an all-to-all gives each rank whole sequences of some heads, and another returns
      the results: the same bits as one process. The number of ranks divides the query heads, and
      divides the KV heads or is divided by them.

    Args:
        q: ``[B, n, H, D]`` with the n tokens of this rank, or packed ``[n, H, D]`` with cu_seqlens.
        k, v: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]`` (packed ``[n, Hk, ...]``), the same tokens.
        mesh, group: a one-dimensional device mesh, or a process group; None = all ranks.
        schedule: "ring", "allgather", "ulysses", or "auto": the schedule that supports the call and
            sends the fewest bytes (:func:`plan`).
        order: "contiguous" or "zigzag" (equal work on all ranks for causal attention).
        length: number of tokens of the whole sequence. None: the sum of sizes, or equal shards on
            all ranks.
        sizes: number of tokens of each rank, in contiguous order. None: the rule of
            :func:`shard_sequence`.
        cu_seqlens: int32 ``[N + 1]``, offsets of packed sequences in the whole sequence; the same
            on every rank. Read on the host.
        return_lse: also return lse (softmax) or the row sums (normalize="sum") of these tokens.
        options: options of :func:`tokenmill.attention`: kind, normalize, scale, score_bias, sink,
            softcap, causal, window, precision, backend; with "ulysses" alibi_slopes and invariant
            too. Parameters (score_bias, sink, alibi_slopes) are the same on all ranks; their
            gradients are the contributions of this rank's rows ("ulysses": heads), to be summed
            over the ranks as for any replicated parameter.

    Returns:
        out ``[B, n, H, Dv]`` (packed ``[n, H, Dv]``) in the dtype of q; with return_lse also
        ``[B, H, n]`` (packed ``[H, n]``) float32. Gradients of q, k, v and of parameters.
        Deterministic.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is sent. PeerError: a
            collective failed, naming rank and group. If arguments that must agree differ between
            ranks, all ranks raise.

    Complexity: the operations of the rank's rows; for bytes and steps see :func:`plan`.

    Paper: Ring Attention (Liu et al. 2023); DeepSpeed Ulysses (Jacobs et al. 2023); A Unified View
    of Long-Sequence Models (Hu et al. 2023), section 4.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> x = torch.randn(1, 16, 4, 32)
        >>> tmd.attention(x, x, x, kind="sigmoid", score_bias="neg_log_n", causal=True).shape
        torch.Size([1, 16, 4, 32])
        >>> dist.destroy_process_group()
    """
    q, k, v = _cast(q, k, v)
    run, call = _prepare(
        OP, q, k, v, mesh, group, schedule, order, length, sizes, cu_seqlens, return_lse, options
    )
    out, lse = run(q, k, v, call)
    return (out, lse) if return_lse else out


def sigmoid_attention(
    q: Tensor, k: Tensor, v: Tensor, *, score_bias: Any = "neg_log_n", **options: Any
) -> Tensor:
    """:func:`attention` with kind="sigmoid" and a score bias of -log n, n being the length of the
    whole sequence, as in :func:`tokenmill.sigmoid_attention`. No lse is sent.

    Args:
        q, k, v, options: as in :func:`attention`.
        score_bias: as in :func:`attention`; default "neg_log_n".

    Returns:
        out, as in :func:`attention`.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: Theory, Analysis, and Best Practices for Sigmoid Self-Attention (Ramapuram et al. 2024).

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> x = torch.randn(1, 16, 4, 32)
        >>> tmd.sigmoid_attention(x, x, x).shape
        torch.Size([1, 16, 4, 32])
        >>> dist.destroy_process_group()
    """
    out = attention(q, k, v, kind="sigmoid", score_bias=score_bias, **options)
    assert isinstance(out, Tensor)
    return out


@Autocast(lower=("q", "k", "v")).applied
def _cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, v


RUN = {"ring": ring_attention, "allgather": gathered_attention, "ulysses": head_attention}


def _prepare(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh | None,
    group: dist.ProcessGroup | None,
    schedule: str,
    order: str,
    length: int | None,
    sizes: Sequence[int] | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    options: Any,
) -> tuple[Any, Call]:
    check_tensor(op, "cu_seqlens", cu_seqlens, optional=True)
    check_bool(op, "return_lse", return_lse)
    packed = cu_seqlens is not None
    check_qkv(op, q, k, v, 3 if packed else 4, True)
    tokens = q.shape[-3]
    check(k.shape[-3] == tokens, op, "k", f"must have the {tokens} tokens of q", k.shape[-3])
    options = dict(options)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"):
        rule = "must be None: cu_seqlens has the sequences of the whole"
        check(options.pop(name, None) is None, op, name, rule, "a value")
    for name in ("seqlens_k", "block_table"):
        rule = "must be None: distributed.attention_decode takes caches"
        check(options.pop(name, None) is None, op, name, rule, "a value")
    check(options.pop("out", None) is None, op, "out", "must be None: results are new", "a value")
    ranks = Group(op, mesh, group)
    where = layout_of_shard(ranks, "q", tokens, length, order, sizes)
    if cu_seqlens is not None:
        check_cu_seqlens(op, "cu_seqlens", cu_seqlens, cu_seqlens)
        cu_seqlens = cu_seqlens.cpu()
        check_cu_seqlens_values(op, "cu_seqlens", cu_seqlens, where.length)
    kind, normalize = options.setdefault("kind", "softmax"), options.setdefault("normalize", None)
    if return_lse:
        check_text(op, "kind", kind)
        check_return_lse(op, kind, normalize or "none")
    left, right = as_window(op, options.pop("window", (-1, -1)))
    causal = options.pop("causal", False)
    check_bool(op, "causal", causal)
    for side in (left, right):
        check(side >= -1, op, "window", "must be at least -1 on either side", [left, right])
    if options.get("score_bias") == "neg_log_n" and not packed:
        options["score_bias"] = -torch.tensor(float(max(where.length, 1))).log().item()
    softcap = options.get("softcap", 0.0)
    options["softcap"] = as_number(op, "softcap", softcap)
    call = Call(
        ranks,
        where,
        options,
        None if left < 0 else left,
        0 if causal else None if right < 0 else right,
        cu_seqlens,
        return_lse,
    )
    chosen = _choose(op, q, k, v, call, schedule)
    _check_options(q, k, v, call)
    ranks.check_alike(
        tokens=where.sizes,
        schedule=chosen,
        heads=(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]),
        batch=tuple(q.shape[:-3]),
        dtype=q.dtype,
        window=(call.left, call.right),
        kind=(kind, normalize),
        order=order,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.tolist(),
        return_lse=return_lse,
        requires_grad=records_gradients(q, k, v),
        **{name: value for name, value in options.items() if name not in ("kind", "backend")},
    )
    return RUN[chosen], call


def _check_options(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
    """Applies the rules of a plain call to these options: a call refused on one rank only would
    leave the other ranks waiting.
    """
    options = dict(call.options)
    backend = options.pop("backend", None)
    # the same number of sequences, the last of which has all tokens
    if call.cu_seqlens is not None:
        options["cu_seqlens_q"] = ends = torch.zeros_like(call.cu_seqlens, device=q.device)
        ends[-1] = q.shape[0]
    lowered = lower(q, k, v, **options)
    SPEC.forward.check(*lowered, float64=True)
    choose(SPEC, lowered, backend)


def _choose(op: str, q: Tensor, k: Tensor, v: Tensor, call: Call, schedule: str) -> str:
    check_choice(op, "schedule", schedule, "auto", *SCHEDULES)
    against = {name: _reason(name, q, k, call) for name in SCHEDULES}
    if schedule != "auto":
        why = against[schedule]
        check(why is None, op, "schedule", f"must be another one: {why}", schedule)
        return schedule
    able = [name for name in SCHEDULES if against[name] is None]
    if not able:
        reasons = "; ".join(f"{name}: {why}" for name, why in against.items())
        check(False, op, "schedule", f"has none for this call ({reasons})", schedule)
    return cheapest(able, q, k, v, call.group.size, call.where.length)


def _reason(schedule: str, q: Tensor, k: Tensor, call: Call) -> str | None:
    """The reason why a schedule does not support the call; None if it does."""
    options = call.options
    for name in WHOLE:
        if options.get(name) is not None and (name != "alibi_slopes" or schedule != "ulysses"):
            return f"{name} needs the whole sequence on a rank"
    if options.get("invariant") and schedule != "ulysses":
        return "invariant needs the whole sequence on a rank"
    packed = call.cu_seqlens is not None
    if schedule == "ulysses":
        return heads_divide(q.shape[-2], k.shape[-2], call.group.size)
    if packed and options.get("score_bias") == "neg_log_n":
        return "score_bias 'neg_log_n' of packed sequences needs whole ones"
    if schedule == "ring":
        if packed:
            return "packed sequences do not travel"
        if q.dtype == torch.float64 or options.get("backend") == "reference":
            return "it needs the backward of a kernel, which the reference does not have"
    return None
