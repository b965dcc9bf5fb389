"""indexer_kl_loss: divergence between the weights of an indexer and of the attention it serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._call.autocast import Autocast
from .._call.run import call
from .._check import (
    check,
    check_choice,
    check_device_of_q,
    check_dtype,
    check_dtype_of,
    check_last_contiguous,
    check_tensor,
    fail,
    reads_values,
    show,
)
from .._kv_cache import check_int32
from ..tokens.gather_tokens import SPEC as GATHER
from ..tokens.segment_reduce import SPEC as SEGMENT_REDUCE

OP = "indexer_kl_loss"


@Autocast(lower=("q", "k", "weights"), wide=("weights",)).applied
def indexer_kl_loss(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    target: Tensor,
    *,
    activation: str = "relu",
) -> Tensor:
    r"""Loss for training an indexer: the divergence of its weights over listed keys from the
    weights of the attention that it serves.

    With the scores of :func:`indexer_topk_select`, :math:`s_{ij} = \sum_h w_{ih}\, act(q_{ih}
    \cdot k_j)`, and the keys :math:`L_i` in the list of query i,

    .. math::
       loss = \sum_i \sum_{j \in L_i} t_{ij} \log \frac{t_{ij}}{p_{ij}}, \qquad
       p_i = \operatorname{softmax}_{j \in L_i}(s_{ij}), \qquad
       t_{ij} = \frac{target_{ij}}{\sum_{j' \in L_i} target_{ij'}}

    with 0 log 0 = 0. A query without entries, or whose targets are all 0, adds 0 and has gradients
    of 0. Queries are processed in blocks, and the backward recomputes their scores: neither the
    scores of all pairs nor the keys of all lists are ever in memory. Rows are gathered and their
    gradients summed by :func:`gather_tokens` and :func:`segment_reduce`, in an order that only
    depends on the lists; PyTorch computes the products on every device: there is no argument
    `backend`.

    Args:
        q: ``[B, Sq, Hi, D]`` float16, bfloat16 or float32 (or float64), any strides with a
            contiguous last dimension.
        k: ``[B, Sk, D]`` in the dtype of q, one key for all heads.
        weights: ``[B, Sq, Hi]`` float32 or in the dtype of q. A scale of the scores is folded into
            them.
        indices: int32 ``[B, Sq, K]``, the keys of each query as listed by
            :func:`indexer_topk_select`: 0 to Sk - 1, ascending. A key that is listed twice counts
            once, with its first target. On a GPU an entry counts if it is in range and greater than
            all before it.
        counts: int32 ``[B, Sq]``, number of entries of each list, 0 to K. Later values in indices
            and target may be anything.
        target: ``[B, Sq, K]``, the weight that attention gives to the key of each entry, summed
            over heads, finite and nonnegative; float16, bfloat16 or float32 (float64 with float64
            q). It gets no gradient. A GPU does not check these values.
        activation: "relu" or "none".

    Returns:
        The sum over all queries, a float32 scalar (float64 for float64 q). Divide it by the number
        of queries for a mean. Gradients: q, k, weights, in reverse mode; second derivatives too,
        but these keep the keys of all lists in memory.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs. Values are not checked
            on GPUs and within the transforms of torch.func.

    Complexity: 2 Hi D operations for each entry of a list, and 6 Hi D for the backward; extra
    memory of a few times a block of queries, which is 2^22 elements on a CPU and 2^26 on a GPU, or
    Sk entries, or one query, whichever is largest.

    Paper: DeepSeek-V3.2-Exp (DeepSeek-AI 2025), continued pre-training: the dense warm-up (lists of
    all keys) and the sparse training of its lightning indexer.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, weights = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 8), torch.rand(1, 6, 2)
        >>> indices, counts, scores = tm.indexer_topk_select(q, k, weights, 4, return_values=True)
        >>> loss = tm.indexer_kl_loss(q, k, weights, indices, counts, scores.softmax(-1))
        >>> abs(loss.item()) < 1e-4  # the target is what the indexer has
        True
    """
    given = {
        "q": q, "k": k, "weights": weights, "indices": indices, "counts": counts, "target": target,
    }  # fmt: skip
    for name, t in given.items():
        check_tensor(OP, name, t)
    check_choice(OP, "activation", activation, "relu", "none")
    _check_rows(q, k, weights)
    _check_lists(q, indices, counts, target)
    target = target.detach()
    if reads_values(q):
        _check_values(k, indices, counts, target)
    apply = _Rows.apply
    if torch.compiler.is_compiling() and not any(t.requires_grad for t in (q, k, weights)):
        # Dynamo would pass it a context, which setup_context receives instead
        apply = _Rows.forward
    rows: Tensor = apply(q, k, weights, indices, counts, target, activation)
    return _sum(rows.flatten())


# Elements in a block of queries: keys, and products with heads.
CPU_ELEMENTS, GPU_ELEMENTS = 2**22, 2**26


def _blocks(q: Tensor, k: Tensor, entries: int) -> Iterator[tuple[slice, slice]]:
    """Sequences and queries of each block: several whole sequences, or a part of one. A block has
    at least as many entries as a sequence has keys, because the gradient of all keys is added after
    each block.
    """
    batch, queries, heads, dim = q.shape
    if 0 in (batch, queries, entries, k.shape[1]):
        return
    elements = CPU_ELEMENTS if q.device.type == "cpu" else GPU_ELEMENTS
    maximum = max(1, max(elements // (dim + heads), k.shape[1]) // entries)
    sequences, rows = max(1, maximum // queries), min(maximum, queries)
    for b in range(0, batch, sequences):
        for i in range(0, queries, rows):
            yield slice(b, b + sequences), slice(i, i + rows)


class _Block(NamedTuple):
    """A block of queries with E entries each, in P parts. An invalid entry has id -1, a zero key
    and target 0.
    """

    q: Tensor  # [B, S, 1, H, D]
    weights: Tensor  # [B, S, 1, H]
    ids: Tensor  # [B, S, E]
    keys: Tensor  # [B, S, P, E / P, D]
    target: Tensor  # [B, S, E], sums to 1 or is 0
    products: Tensor  # [B, S, P, H, E / P]
    log_p: Tensor  # [B, S, E]


# The threads of a CPU only share long sums, or several products: sums over entries have at most
# this many terms, and there are always at least two products.
PART = 1024


def _act(products: Tensor, activation: str) -> Tensor:
    return products.relu() if activation == "relu" else products


def _block(
    at: tuple[slice, slice],
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    target: Tensor,
    activation: str,
) -> _Block:
    wide = torch.promote_types(q.dtype, torch.float32)
    ids, t = _listed(indices[at], counts[at], k.shape[1]), target[at].to(wide)
    one = ids.shape[0] * ids.shape[1] == 1
    parts = max(2 if one else 1, -(-ids.shape[2] // PART))
    rest = -ids.shape[2] % parts
    ids, t = pad(ids, (0, rest), value=-1), pad(t, (0, rest))

    t = torch.where(ids < 0, 0.0, t)
    peak = t.amax(-1, keepdim=True)
    ids = torch.where(peak == 0, -1, ids)
    t = t / torch.where(peak == 0, 1.0, peak)  # keeps the sum of finite targets finite
    t = t / torch.where(peak == 0, 1.0, _sum(t)[..., None])

    queries, w = q[at].to(wide)[:, :, None], weights[at].to(wide)[:, :, None]
    rows = call(GATHER, (k[at[0]], ids.flatten(1)), None)[0]
    keys = rows.unflatten(1, (*ids.shape[1:2], parts, -1)).to(wide)
    products = queries @ keys.mT
    scores = (w[..., None, :] @ _act(products, activation)).flatten(2)
    some = (ids >= 0).any(-1, keepdim=True)
    log_p = scores.masked_fill((ids < 0) & some, -torch.inf).log_softmax(-1)
    return _Block(queries, w, ids, keys, t, products, log_p)


def _listed(indices: Tensor, counts: Tensor, keys: int) -> Tensor:
    """Ids of the valid entries, -1 for the others."""
    place = torch.arange(indices.shape[-1], device=indices.device)
    there = (place < counts[..., None]) & (indices >= 0) & (indices < keys)
    ids = torch.where(there, indices, -1)
    highest = pad(ids.cummax(-1).values[..., :-1], (1, 0), value=-1)
    return torch.where(ids > highest, ids, -1)


def _sum(x: Tensor) -> Tensor:
    """Sum over the last dimension in an order independent of the number of threads: PyTorch splits
    one long sum across all threads.
    """
    while x.shape[-1] > PART:
        x = pad(x, (0, -x.shape[-1] % PART)).unflatten(-1, (-1, PART)).sum(-1)
    return x.sum(-1)


class _Rows(torch.autograd.Function):
    """The divergence [B, Sq], one value per query."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, weights: Tensor, *lists: Any) -> Tensor:
        parts = []
        for at in _blocks(q, k, lists[0].shape[-1]):
            block = _block(at, q, k, weights, *lists)
            t = block.target
            parts.append(_sum(torch.where(t == 0, 0.0, t * (t.log() - block.log_p))).flatten())
        if not parts:
            return q.new_zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        return torch.cat(parts).view(q.shape[:2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        q, k, weights, indices, counts, target = ctx.saved_tensors
        need_q, need_k, need_weights = ctx.needs_input_grad[:3]
        dq: list[Tensor] = []
        dk: list[Tensor] = []  # one per sequence of a block
        dw: list[Tensor] = []
        for at in _blocks(q, k, indices.shape[-1]):
            block = _block(at, q, k, weights, indices, counts, target, ctx.activation)
            empty = (block.ids < 0).all(-1)[..., None]
            ds = (block.log_p.exp() - block.target) * dy[at][..., None]
            ds = ds.masked_fill(block.ids < 0, 0.0).unflatten(-1, (block.keys.shape[2], -1))
            if need_weights:
                rows = (_act(block.products, ctx.activation) @ ds[..., None]).sum(2).squeeze(-1)
                dw.append(rows.masked_fill(empty, 0.0).flatten(0, 1))
            dz = ds[..., None, :] * block.weights[..., None]
            if ctx.activation == "relu":
                dz = torch.where(block.products > 0, dz, 0.0)
            if need_q:
                rows = (dz @ block.keys).sum(2).masked_fill(empty[..., None], 0.0)
                dq.append(rows.flatten(0, 1))
            if need_k:
                rows = (dz.mT @ block.q).flatten(1, 3)
                part = _sums_of_keys(rows, block.ids, k.shape[1])
                if at[1].start == 0:
                    dk.append(part)
                else:
                    dk[-1] = dk[-1] + part
        gradients = [
            (torch.cat(parts).view(t.shape).to(t.dtype) if parts else torch.zeros_like(t))
            if needed else None
            for t, parts, needed in ((q, dq, need_q), (k, dk, need_k), (weights, dw, need_weights))
        ]  # fmt: skip
        return (*gradients, None, None, None, None)


def _sums_of_keys(rows: Tensor, ids: Tensor, keys: int) -> Tensor:
    """Sums [B, keys, D] of rows [B, S E, D] of entries by id, in the order of the entries."""
    place = torch.where(ids < 0, keys, ids).flatten(1)
    ordered, perm = place.sort(dim=1, stable=True)
    firsts = torch.arange(keys + 1, dtype=ids.dtype, device=ids.device)
    firsts = firsts + torch.zeros_like(ordered[:, :1])
    offsets = torch.searchsorted(ordered, firsts, out_int32=True)
    sums: Tensor = call(SEGMENT_REDUCE, (rows, offsets, perm.int(), None, "sum"), None)[0]
    return sums


def _check_rows(q: Tensor, k: Tensor, weights: Tensor) -> None:
    check(q.dim() == 4, OP, "q", "must have 4 dimensions [B, S, H, D]", q.dim())
    check(k.dim() == 3, OP, "k", "must have 3 dimensions [B, S, D]", k.dim())
    check_dtype(OP, "q", q, float64=True)
    check_dtype_of(OP, "k", k, "q", q)
    if weights.shape != q.shape[:3]:
        fail(OP, "weights", f"must have shape {show(q.shape[:3])}", weights.shape)
    if weights.dtype not in (torch.float32, q.dtype):
        rule = f"must be float32 or have the dtype of q, {show(q.dtype)}"
        fail(OP, "weights", rule, weights.dtype)
    for name, t in (("k", k), ("weights", weights)):
        check_device_of_q(OP, name, t, q)
    for name, t in (("q", q), ("k", k), ("weights", weights)):
        check_last_contiguous(OP, name, t)
    heads, dim = q.shape[2:]
    check(heads >= 1, OP, "q", "must have at least 1 head", heads)
    check(dim >= 1, OP, "q", "must have a head dimension of at least 1", dim)
    if k.shape[2] != dim:
        fail(OP, "k", f"must have the head dimension of q, {dim}", k.shape[2])
    if k.shape[0] != q.shape[0]:
        fail(OP, "k", f"must have the batch size of q, {q.shape[0]}", k.shape[0])
    keys = k.shape[0] * k.shape[1]
    check(keys < 2**31, OP, "k", "must have fewer than 2^31 keys in all", keys)


def _check_lists(q: Tensor, indices: Tensor, counts: Tensor, target: Tensor) -> None:
    batch, queries = q.shape[:2]
    fits = indices.dim() == 3 and indices.shape[:2] == q.shape[:2]
    check(fits, OP, "indices", f"must have shape [{batch}, {queries}, K]", indices.shape)
    for name, t, wanted in (
        ("counts", counts, indices.shape[:2]), ("target", target, indices.shape),
    ):  # fmt: skip
        if t.shape != wanted:
            fail(OP, name, f"must have shape {show(wanted)}", t.shape)
    check_int32(OP, "indices", indices)
    check_int32(OP, "counts", counts)
    check_dtype(OP, "target", target, float64=q.dtype == torch.float64)
    for name, t in (("indices", indices), ("counts", counts), ("target", target)):
        check_device_of_q(OP, name, t, q)
    entries = indices.shape[2]
    check(entries < 2**31, OP, "indices", "must have fewer than 2^31 entries in a list", entries)


def _check_values(k: Tensor, indices: Tensor, counts: Tensor, target: Tensor) -> None:
    keys, entries = k.shape[1], indices.shape[2]
    bad = counts[(counts < 0) | (counts > entries)]
    if bad.numel():
        fail(OP, "counts", f"must be 0 to {entries}", int(bad[0]))
    listed = torch.arange(entries, device=indices.device) < counts[..., None]
    bad = indices[listed & ((indices < 0) | (indices >= keys))]
    if bad.numel():
        fail(OP, "indices", f"must be 0 to {keys - 1} up to the count", int(bad[0]))
    descends = listed[..., 1:] & (indices[..., 1:] < indices[..., :-1])
    bad = indices[..., 1:][descends]
    if bad.numel():
        fail(OP, "indices", "must ascend up to the count", int(bad[0]))
    bad = target[listed & ~((target >= 0) & (target < torch.inf))]
    if bad.numel():
        fail(OP, "target", "must be finite and not negative up to the count", float(bad[0]))
