"""native_sparse_attention: compressed keys, selected blocks and a window, mixed by gates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Never

from .. import masks
from .._call.autocast import Autocast
from .._check import (
    as_int,
    check,
    check_device_of_q,
    check_dtype,
    check_dtype_of,
    check_qkv,
    check_tensor,
    fail,
    show,
)
from .._lowering import scale_or_default
from .._other_names import refuse, refuses_other_names
from ..dense.attention import attention
from ..select.kv_block_scores import kv_block_scores
from ..select.topk_select import MAX_K, topk_select
from .block_sparse_attention import block_sparse_attention
from .query_lists import check_block, for_heads, ordered_sum, positions, stripes

OP = "native_sparse_attention"


@Autocast(lower=("q", "k", "v", "k_compressed", "v_compressed", "k_window", "v_window")).applied
@refuses_other_names
def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    k_compressed: Tensor | None = None,
    v_compressed: Tensor | None = None,
    k_window: Tensor | None = None,
    v_window: Tensor | None = None,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    topk: int = 16,
    num_first: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
    backend: str | None = None,
    **other: Never,
) -> Tensor:
    r"""Native Sparse Attention: causal attention to compressed keys, to selected blocks and to a
    window, each with its own softmax, mixed by gates.

    .. math::
       out_t = \sum_{c \in \{cmp, slc, win\}} g^c_t \operatorname{Attn}(q_t, K^c_t, V^c_t)

    - Compressed: key i represents the tokens i stride to i stride + block - 1, and is visible to
      queries at or after the last of these. Its weights in a head are :math:`p^{cmp}_t`.
    - Selected: a query attends to the first num_first and the last num_local of the blocks of
      select_block tokens up to its own, and to those with the largest importance, topk in all. A
      block's importance is the weight of the compressed keys that represent its tokens, counted
      once per stride of tokens that they share, summed over the query heads of a GQA group, which
      share the list:

      .. math::
         p^{slc}_t[j] = \sum_h \sum_{m=0}^{l'/d - 1} \sum_{n=0}^{l/d - 1}
         p^{cmp}_{t,h}[\tfrac{l'}{d} j + m - n]

      with l, d and l' for block, stride and select_block. Ties go to the earlier block.
    - Window: the last `window` tokens, including the query's own.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256. Query i is at position Sk - Sq + i: a
            whole sequence, or its last chunk.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]``, Hk a divisor of H; read by the selected
            blocks.
        gates: ``[B, Sq, H, 3]`` floating-point, factors of the three branches in the order above
            (in the paper sigmoids of an MLP of the token).
        k_compressed, v_compressed: ``[B, N, Hk, D]`` and ``[B, N, Hk, Dv]`` with N = floor((Sk -
            block) / stride) + 1, at least 0: the blocks compressed by a learned map. None: means.
        k_window, v_window: keys and values of the window, shaped as k and v. None: k and v.
        block, stride: tokens represented by a compressed key, and the distance between two; stride
            divides block and select_block.
        select_block: tokens of a selected block, a power of two up to 128.
        topk: number of blocks per query, 1 to 65536, including num_first and num_local.
        num_first, num_local: numbers of first and last blocks that are always selected.
        window: tokens of the window, at least 1.
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        ``[B, Sq, H, Dv]`` in the dtype of q. A branch with no visible key adds 0. Gradients of all
        tensors, through the three branches, not through the choice, as in the paper.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 H (D + Dv) (S / stride + topk select_block + window) operations for a query, and
    2 H D S / stride to select. Memory linear in S, and one stripe of weights.

    Paper: Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention (Yuan
    et al. 2025), sections 3.2 and 3.3, equations 5 to 12; defaults from section 4.1.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.randn(1, 200, 4, 32), *torch.randn(2, 1, 200, 1, 32)
        >>> gates = torch.rand(1, 200, 4, 3)
        >>> tm.native_sparse_attention(q, k, v, gates, topk=4, window=64).shape
        torch.Size([1, 200, 4, 32])
        >>> alone = torch.tensor([0.0, 0.0, 1.0]).expand_as(gates)
        >>> near = tm.attention(q, k, v, causal=True, window=(63, 0))
        >>> torch.equal(tm.native_sparse_attention(q, k, v, alone, window=64), near)
        True
    """
    if other:
        refuse(native_sparse_attention, other)
    sizes = {
        "block": block, "stride": stride, "select_block": select_block, "topk": topk,
        "num_first": num_first, "num_local": num_local, "window": window,
    }  # fmt: skip
    sizes = {name: as_int(OP, name, value) for name, value in sizes.items()}
    _check_tensors(q, k, v, gates, (k_compressed, v_compressed), (k_window, v_window))
    _check_sizes(**sizes)
    factor = scale_or_default(OP, scale, q)
    block, stride = sizes["block"], sizes["stride"]
    keys, wanted = k.shape[1], max((k.shape[1] - block) // stride + 1, 0)
    if k_compressed is None or v_compressed is None:
        k_compressed, v_compressed = (_means(t, block, stride, wanted) for t in (k, v))
    if k_compressed.shape[1] != wanted:
        rule = f"must have floor((Sk - block) / stride) + 1 keys, {wanted}"
        fail(OP, "k_compressed", rule, k_compressed.shape[1])

    lengths = torch.full((1,), keys, dtype=torch.int32, device=q.device)
    at = positions(q.shape[1], lengths)
    complete = (at + 1 - block).div(stride, rounding_mode="floor") + 1
    complete = complete.clamp(0, wanted)  # compressed keys visible to a query, [1, Sq]
    ends = complete[:, None, :, None]
    coarse, lse = attention(
        q, k_compressed, v_compressed, mask=masks.ranges(torch.zeros_like(ends), ends),
        scale=factor, return_lse=True, backend=backend,
    )  # fmt: skip
    lists = _selected(
        q.detach(), k_compressed.detach(), lse.detach(), complete, at, k.shape[2], keys, factor,
        sizes, backend,
    )  # fmt: skip
    fine = block_sparse_attention(
        q, k, v, *lists, block_q=1, block_k=sizes["select_block"], causal=True, scale=factor,
        backend=backend,
    )  # fmt: skip
    near_k, near_v = (k, v) if k_window is None or v_window is None else (k_window, v_window)
    back = min(sizes["window"] - 1, max(keys, 1))
    near = attention(
        q, near_k, near_v, causal=True, window=(back, 0), scale=factor, backend=backend
    )
    wide = torch.promote_types(q.dtype, torch.float32)
    mixed = [
        gate[..., None].to(wide) * branch.to(wide)
        for gate, branch in zip(gates.unbind(-1), (coarse, fine, near), strict=True)
    ]
    return (mixed[0] + mixed[1] + mixed[2]).to(q.dtype)


def _check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    compressed: tuple[Tensor | None, Tensor | None],
    window: tuple[Tensor | None, Tensor | None],
) -> None:
    for name, t in (("q", q), ("k", k), ("v", v), ("gates", gates)):
        check_tensor(OP, name, t)
    check_qkv(OP, q, k, v, 4, True)
    for what, (keys, values) in (("compressed", compressed), ("window", window)):
        for name, option in ((f"k_{what}", keys), (f"v_{what}", values)):
            check_tensor(OP, name, option, optional=True)
        if (keys is None) != (values is None):
            missing, other = ("k", "v") if keys is None else ("v", "k")
            fail(OP, f"{missing}_{what}", f"must be given with {other}_{what}", None)
        for name, given, like in ((f"k_{what}", keys, k), (f"v_{what}", values, v)):
            if given is None:
                continue
            count = given.shape[1] if what == "compressed" and given.dim() == 4 else k.shape[1]
            shape = [like.shape[0], count, *like.shape[2:]]
            if [*given.shape] != shape:
                fail(OP, name, f"must have shape {show(shape)}", given.shape)
            check_dtype_of(OP, name, given, "q", q)
            check_device_of_q(OP, name, given, q)
        if keys is not None and values is not None and keys.shape[1] != values.shape[1]:
            rule = f"must have the keys of k_{what}, {keys.shape[1]}"
            fail(OP, f"v_{what}", rule, values.shape[1])
    wanted = (*q.shape[:3], 3)
    if gates.shape != wanted:
        fail(OP, "gates", f"must have shape {show(wanted)}", gates.shape)
    check_dtype(OP, "gates", gates, float64=True)
    check_device_of_q(OP, "gates", gates, q)


def _check_sizes(
    block: int, stride: int, select_block: int, topk: int, num_first: int, num_local: int,
    window: int,
) -> None:  # fmt: skip
    check(1 <= stride < 2**31, OP, "stride", "must be 1 to 2^31 - 1", stride)
    if not (0 < block < 2**31 and block % stride == 0):
        fail(OP, "block", f"must be a multiple of stride, {stride}, below 2^31", block)
    check_block(OP, "select_block", select_block)
    if select_block % stride != 0:
        fail(OP, "select_block", f"must be a multiple of stride, {stride}", select_block)
    check(1 <= topk <= MAX_K, OP, "topk", f"must be 1 to {MAX_K}", topk)
    for name, value in (("num_first", num_first), ("num_local", num_local)):
        check(value >= 0, OP, name, "must not be negative", value)
    if topk < num_first + num_local:
        rule = f"must be at least num_first + num_local, {num_first + num_local}"
        fail(OP, "topk", rule, topk)
    check(window >= 1, OP, "window", "must be at least 1", window)


def _means(t: Tensor, block: int, stride: int, count: int) -> Tensor:
    """Block means [B, count, Hk, D], summed in float32."""
    wide = torch.promote_types(t.dtype, torch.float32)
    tokens = (count - 1) * stride + block if count else 0
    sums = ordered_sum(t[:, :tokens].to(wide).unflatten(1, (tokens // stride, stride)), 2)
    total = sums[:, :count]
    for part in range(1, block // stride if count else 1):
        total = total + sums[:, part : part + count]
    return (total / block).to(t.dtype)


def _selected(
    q: Tensor,
    k_compressed: Tensor,
    lse: Tensor,
    complete: Tensor,
    at: Tensor,
    kv_heads: int,
    keys: int,
    scale: float,
    sizes: dict[str, int],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Lists [B, Hk, Sq, topk] and counts."""
    batch, size = q.shape[0], sizes["select_block"]
    blocks = -(-keys // size)
    topk = min(sizes["topk"], max(blocks, 1))
    first = min(sizes["num_first"], topk)
    seen = (at.div(size, rounding_mode="floor") + 1).clamp(min=0).expand(batch, -1)
    column = torch.arange(k_compressed.shape[1], device=q.device)
    parts = []
    for rows in stripes(q, k_compressed.shape[1] + blocks):
        z = kv_block_scores(q[:, rows], k_compressed, scale=scale, backend=backend)
        visible = column < complete[0, rows, None]
        weight = torch.where(visible, (z - lse[:, :, rows, None]).exp(), 0)
        weight = ordered_sum(weight.unflatten(1, (kv_heads, -1)), 2)  # [B, Hk, rows, N]
        importance = _shared(weight, sizes["block"], sizes["stride"], size, blocks)
        indices, counts = topk_select(
            importance.flatten(0, 2), topk, lengths=for_heads(seen[:, rows], kv_heads),
            force_first=first, force_last=min(sizes["num_local"], topk - first), backend=backend,
        )  # fmt: skip
        shape = importance.shape[:3]
        parts.append((indices.view(*shape, topk), counts.view(shape)))
    return torch.cat([i for i, _ in parts], 2), torch.cat([c for _, c in parts], 2)


def _shared(weight: Tensor, block: int, stride: int, select_block: int, blocks: int) -> Tensor:
    """[..., N] -> [..., blocks]: sums, per block, the weights of the compressed keys of its
    strides. Stride c belongs to the compressed keys c - block / stride + 1 to c.
    """
    over, each = block // stride, select_block // stride
    if weight.shape[-1] == 0:
        return weight.new_zeros(*weight.shape[:-1], blocks)
    padded = pad(weight, (over - 1, each * blocks - weight.shape[-1]))
    of_strides = padded[..., : each * blocks].clone()
    for n in range(1, over):
        of_strides = of_strides + padded[..., n : n + each * blocks]
    return ordered_sum(of_strides.unflatten(-1, (blocks, each)), -1)
