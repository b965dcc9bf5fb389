"""moba_attention: each query attends to its own block and to the blocks with the best mean keys."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Never

from .._call.autocast import Autocast
from .._check import as_int, check, check_bool, check_qkv, check_tensor, is_power_of_two
from .._lowering import scale_or_default
from .._other_names import refuse, refuses_other_names
from ..select.block_pool_keys import block_pool_keys
from ..select.kv_block_scores import kv_block_scores
from ..select.rules import check_per_request
from ..select.topk_select import MAX_K, topk_select
from .block_sparse_attention import block_sparse_attention
from .query_lists import MAX_BLOCK, for_heads, positions, split_blocks, stripes

OP = "moba_attention"


@Autocast(lower=("q", "k", "v")).applied
@refuses_other_names
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 512,
    topk: int = 3,
    scale: float | None = None,
    seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **other: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Mixture of Block Attention: causal attention of each query, in each head, to its own block
    of keys and to the earlier blocks whose mean key has the largest product with it.

    Keys are cut into blocks :math:`I_i` of `block` keys from the first key on. For a query at
    position t, in block c,

    .. math::
       s_i = q \cdot \operatorname{mean}_{j \in I_i}(k_j) \; (i < c), \quad s_c = \infty, \qquad
       I = \bigcup_{i \in \operatorname{topk}(s)} I_i \cap \{j \le t\}, \qquad
       out = \operatorname{softmax}_{j \in I}(\mathrm{scale}\; q \cdot k_j)\, v_j

    so that the query's own block is one of the topk. Ties go to the earlier block; a NaN product is
    never chosen.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256. Query i is at position n - Sq + i, with n
            = Sk or seqlens_k[b]: a whole sequence, or its last chunk.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]``, Hk a divisor of H.
        block: keys of a block, a power of two up to 128 or a multiple of 128.
        topk: number of blocks per query, 1 to 65536, including its own.
        scale: factor of q.k; None = 1/sqrt(D).
        seqlens_k: int32 ``[B]``, number of keys of each request, clamped to 0 to Sk. None: all.
        return_lse: also return lse.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q; with return_lse also lse ``[B, H, Sq]`` float32,
        natural log. Gradients of q, k and v through the attention, not through the choice, as in
        the paper. With at most topk visible blocks it is causal attention.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 H D products per query and block, and 2 H (D + Dv) operations for each key of its
    blocks. Memory of 4 B H Sq topk ceil(block / 128) bytes for lists, and one stripe of scores.

    Paper: MoBA: Mixture of Block Attention for Long-Context LLMs (Lu et al. 2025), section 2.2,
    equations 2 to 6 and the two paragraphs on causality. The released code counts the own block
    among the topk, too.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.randn(1, 300, 4, 32), *torch.randn(2, 1, 300, 2, 32)
        >>> tm.moba_attention(q, k, v, block=32, topk=3).shape
        torch.Size([1, 300, 4, 32])
        >>> exact = tm.attention(q, k, v, causal=True)
        >>> bool(torch.allclose(tm.moba_attention(q, k, v, topk=1), exact, atol=1e-5))
        True
    """
    if other:
        refuse(moba_attention, other)
    check_tensor(OP, "seqlens_k", seqlens_k, optional=True)
    check_bool(OP, "return_lse", return_lse)
    block, topk = as_int(OP, "block", block), as_int(OP, "topk", topk)
    check_qkv(OP, q, k, v, 4, True)
    small = is_power_of_two(block) and block <= MAX_BLOCK
    whole = block > 0 and block % MAX_BLOCK == 0
    rule = f"must be a power of two up to {MAX_BLOCK} or a multiple of {MAX_BLOCK}"
    check(small or whole, OP, "block", rule, block)
    check(1 <= topk <= MAX_K, OP, "topk", f"must be 1 to {MAX_K}", topk)
    check_per_request(OP, "seqlens_k", seqlens_k, q.shape[0], "q", q)
    factor = scale_or_default(OP, scale, q)

    keys = k.shape[1]
    if whole:  # a block has at most as many parts as there are keys
        block = min(block, max(1, -(-keys // MAX_BLOCK)) * MAX_BLOCK)
    topk = min(topk, max(1, -(-keys // block)))
    part = min(block, MAX_BLOCK)
    lists = _own_and_best_blocks(q.detach(), k.detach(), block, topk, seqlens_k, backend)
    out, lse = block_sparse_attention(
        q, k, v, *split_blocks(*lists, block // part), block_q=1, block_k=part, causal=True,
        scale=factor, seqlens_k=seqlens_k, return_lse=True, backend=backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _own_and_best_blocks(
    q: Tensor, k: Tensor, block: int, topk: int, seqlens_k: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Lists [B, H, Sq, topk] and counts."""
    batch, queries, heads = q.shape[:3]
    n = seqlens_k
    n = torch.full((batch,), k.shape[1], dtype=torch.int32, device=q.device) if n is None else n
    at = positions(queries, n.clamp(0, k.shape[1]))
    seen = (at.div(block, rounding_mode="floor") + 1).clamp(min=0)
    means = block_pool_keys(k, block, lengths=seqlens_k, backend=backend)
    parts = []
    for rows in stripes(q, means.shape[1]):
        scores = kv_block_scores(q[:, rows], means, scale=1.0, backend=backend)
        indices, counts = topk_select(
            scores.flatten(0, 2), topk, lengths=for_heads(seen[:, rows], heads), force_last=1,
            backend=backend,
        )  # fmt: skip
        shape = scores.shape[:3]
        parts.append((indices.view(*shape, topk), counts.view(shape)))
    return torch.cat([i for i, _ in parts], 2), torch.cat([c for _, c in parts], 2)
