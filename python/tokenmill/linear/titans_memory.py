"""titans_memory: a linear memory that steps of gradient descent write."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._autocast import Autocast
from .._check import (
    as_int,
    check,
    check_bool,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_device_of_q,
    check_dtype,
    check_dtype_of,
    check_tensor,
    check_text,
    fail,
    reads_values,
    show,
)
from .._derivatives import transformed
from .._lowering import widen
from .titans_chunks import TitansChunks

OP = "titans_memory"
AUTOCAST = Autocast(lower=("q", "k", "v"))
State = tuple[Tensor, Tensor]
Loss = Literal["mse"]


class TitansOptions(TypedDict, total=False):
    """Keywords of :func:`titans_memory` beside gates and return_final_state."""

    chunk_size: int
    loss: Loss
    initial_state: State | None
    cu_seqlens: Tensor | None


@overload
def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    return_final_state: Literal[False] = ...,
    **options: Unpack[TitansOptions],
) -> Tensor: ...


@overload
def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    return_final_state: Literal[True],
    **options: Unpack[TitansOptions],
) -> tuple[Tensor, State]: ...


@AUTOCAST.applied
def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    chunk_size: int = 64,
    loss: Loss = "mse",
    initial_state: State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, State]:
    r"""The linear memory of Titans: gradient descent with momentum and forgetting, while it reads.

    Memory M and momentum S of a head are ``[D, Dv]``. For token t, with c the last token before its
    chunk,

    .. math::
        S_t = \eta_t S_{t-1} - \theta_t \nabla \ell_t(M_c), \qquad
        M_t = (1 - \alpha_t) M_{t-1} + S_t, \qquad out_t = q_t M_t

    where :math:`\ell_t(M) = \frac12 |k_t M - v_t|^2`, so :math:`\nabla \ell_t(M_c) = k_t^T (k_t M_c
    - v_t)`. A chunk has chunk_size tokens, and a call, or a packed sequence, begins with a new one.
    With chunk_size 1 each gradient is that at the memory before its token; a larger chunk_size
    computes something else, faster. Chunks are products of matrices, with nothing divided: alpha =
    1, eta = 0 and theta = 0 are exact. The products are those of PyTorch on every device, in
    float32, or float64 beside such q: there is no argument `backend`.

    Args:
        q, k: ``[B, S, H, D]``, or packed ``[T, H, D]`` with cu_seqlens; float16, bfloat16, float32
            or float64.
        v: ``[B, S, H, Dv]`` (packed ``[T, H, Dv]``) in the dtype of q.
        alpha: ``[B, S, H]`` (packed ``[T, H]``) of any floating-point dtype, the share that is
            forgotten. The paper has gates from 0 to 1; other numbers are computed as given.
        eta: as alpha, the share of the momentum that stays.
        theta: as alpha, the step of a token. The tokens of a chunk step from the same memory: with
            keys of length 1, sums of theta / (1 - eta) over a chunk that are above 2 can diverge.
        chunk_size: tokens whose gradients are taken at the same memory, at least 1.
        loss: "mse".
        initial_state: (M, S), each float32 (float64 beside such q) ``[B, H, D, Dv]`` (packed: one
            for each sequence), as a call with return_final_state returned them. None: 0.
        return_final_state: also return memory and momentum after the last token.
        cu_seqlens: int32 ``[N + 1]``, where packed sequences begin and end. On a GPU, which does
            not check these values, tokens before the first sequence and behind the last one have
            out 0 and gradients 0.

    Returns:
        out ``[B, S, H, Dv]`` (packed ``[T, H, Dv]``) in the dtype of q; with return_final_state
        also (M, S) in the dtype of initial_state. An empty sequence leaves its state as it was.
        Gradients: q, k, v, alpha, eta, theta, initial_state, through out and state, any number of
        times.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: 2 H S (3 D Dv + 2 D Dv + C (D + Dv)) operations with C = chunk_size, and 2.3 times
    that for the backward. Extra memory: for the backward, which computes all else again, and for
    packed sequences 2 D Dv numbers for each chunk and head; and matrices [C, C] of a block of
    chunks, 2^18 numbers each on a CPU and 2^25 on a GPU. torch.compile makes a graph for each
    length.

    Paper: Titans: Learning to Memorize at Test Time (Behrouz et al. 2025), sections 3.1 and 3.2.
    Its :math:`\ell` has no factor of 1/2: its theta is half of the one here.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 100, 4, 16), dim=-1)
        >>> alpha, eta, theta = 0.01 * torch.ones(3, 2, 100, 4)
        >>> gates = {"alpha": alpha, "eta": eta, "theta": theta}
        >>> whole = tm.titans_memory(q, k, v, **gates, chunk_size=20)
        >>> first, state = tm.titans_memory(
        ...     *(t[:, :60] for t in (q, k, v)), **{n: g[:, :60] for n, g in gates.items()},
        ...     chunk_size=20, return_final_state=True)
        >>> rest = tm.titans_memory(
        ...     *(t[:, 60:] for t in (q, k, v)), **{n: g[:, 60:] for n, g in gates.items()},
        ...     chunk_size=20, initial_state=state)
        >>> torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5)
        True
    """
    gates = {"alpha": alpha, "eta": eta, "theta": theta}
    check_inputs(OP, q, k, v, gates, packed=cu_seqlens is not None)
    chunk_size = check_chunk_size(OP, chunk_size)
    check_text(OP, "loss", loss)
    check(loss == "mse", OP, "loss", "must be 'mse'", loss)
    check_bool(OP, "return_final_state", return_final_state)
    check_tensor(OP, "cu_seqlens", cu_seqlens, optional=True)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(OP, "cu_seqlens", cu_seqlens, q)
        sequences = cu_seqlens.shape[0] - 1
    heads, dim, width = q.shape[-2], q.shape[-1], v.shape[-1]
    _check_state(initial_state, (sequences, heads, dim, width), q)
    if cu_seqlens is not None and reads_values(cu_seqlens):
        check_cu_seqlens_values(OP, "cu_seqlens", cu_seqlens, q.shape[0])

    operator.index(q.shape[-3])  # a graph of torch.compile has the chunks of one length
    alpha, eta, theta = (widen(gate, q) for gate in (alpha, eta, theta))
    if initial_state is None:
        state = alpha.new_zeros(()).expand(sequences, heads, 2 * dim, width)
    else:
        state = torch.cat(initial_state, 2)
    if cu_seqlens is None:
        initial = state.flatten(0, 1)[None]
        leaves = (q, k, v, alpha, eta, theta, initial)
        save = torch.compiler.is_compiling() or transformed()
        save = save or (torch.is_grad_enabled() and any(t.requires_grad for t in leaves))
        out, states = TitansChunks.apply(*leaves, None, None, chunk_size, save)
        final = states[-1].unflatten(0, (sequences, heads)) if return_final_state else state
    else:
        chunk_size = max(1, min(chunk_size, q.shape[0]))
        packing = _Packing.of(cu_seqlens, q.shape[0], chunk_size)
        out, final = packing.run((q, k, v, alpha, eta, theta), state, chunk_size)
    if not return_final_state:
        return out
    memory, momentum = final.split(dim, 2)
    return out, (
        memory.clone(memory_format=torch.contiguous_format),
        momentum.clone(memory_format=torch.contiguous_format),
    )


def check_inputs(
    op: str, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], packed: bool = False
) -> None:
    for name, t in (("q", q), ("k", k), ("v", v), *gates.items()):
        check_tensor(op, name, t)
    layout = "3 dimensions [T, H, D] (packed)" if packed else "4 dimensions [B, S, H, D]"
    check(q.dim() == (3 if packed else 4), op, "q", f"must have {layout}", q.dim())
    check_dtype(op, "q", q, float64=True)
    check(q.shape[-1] > 0, op, "q", "must have a head dimension of at least 1", q.shape[-1])
    for name, t in (("k", k), ("v", v)):
        check_dtype_of(op, name, t, "q", q)
        check_device_of_q(op, name, t, q)
    if k.shape != q.shape:
        fail(op, "k", f"must have the shape of q, {show(q.shape)}", k.shape)
    if v.dim() != q.dim() or v.shape[:-1] != q.shape[:-1]:
        rule = f"must have the shape of q up to the head dimension, {show(q.shape)}"
        fail(op, "v", rule, v.shape)
    check(v.shape[-1] > 0, op, "v", "must have a head dimension of at least 1", v.shape[-1])
    for name, t in gates.items():
        check(t.is_floating_point(), op, name, "must be a floating-point tensor", t.dtype)
        if t.shape != q.shape[:-1]:
            fail(op, name, f"must have shape {show(q.shape[:-1])}", t.shape)
        check_device_of_q(op, name, t, q)


def check_chunk_size(op: str, chunk_size: int) -> int:
    chunk_size = as_int(op, "chunk_size", chunk_size)
    check(chunk_size > 0, op, "chunk_size", "must be at least 1", chunk_size)
    return chunk_size


def check_wide(op: str, name: str, t: Tensor, q: Tensor) -> None:
    wide = torch.promote_types(q.dtype, torch.float32)
    check(t.dtype == wide, op, name, f"must be {show(wide)}", t.dtype)
    check_device_of_q(op, name, t, q)


def _check_state(state: Any, shape: tuple[int, ...], q: Tensor) -> None:
    if state is None:
        return
    pair = isinstance(state, Sequence) and len(state) == 2
    pair = pair and all(isinstance(t, Tensor) for t in state)
    check(pair, OP, "initial_state", "must be a pair of tensors (M, S) or None", state)
    for t in state:
        check_tensor(OP, "initial_state", t)
        if tuple(t.shape) != shape:
            fail(OP, "initial_state", f"must have shape {show(shape)}", t.shape)
        check_wide(OP, "initial_state", t, q)


class _Packing(NamedTuple):
    """Where the tokens of packed sequences lie among chunks that no two sequences share.

    The tokens before the first sequence and those behind the last one count as sequences, 0 and
    N + 1. The number of chunks depends on shapes alone where values are not read.
    """

    place: Tensor  # [T], of a token
    sequence: Tensor  # [chunks], to which a chunk belongs
    restart: Tensor  # [chunks], whether a sequence begins
    behind: Tensor  # [N + 2], the number of chunks up to the end of a sequence
    empty: Tensor  # [N + 2]
    inside: Tensor | None  # [T], whether a token belongs to one of the N; None: all

    @classmethod
    def of(cls, cu_seqlens: Tensor, total: int, chunk: int) -> _Packing:
        cu = cu_seqlens.long().clamp(0, total).cummax(0).values
        begin, end = torch.cat([cu.new_zeros(1), cu]), torch.cat([cu, cu.new_full((1,), total)])
        count = (end - begin + chunk - 1) // chunk
        behind = count.cumsum(0)
        read = reads_values(cu_seqlens)
        chunks = max(int(behind[-1]), 1) if read else total // chunk + begin.shape[0]
        tokens, numbers = (torch.arange(n, device=cu.device) for n in (total, chunks))
        of_token = torch.searchsorted(end, tokens, right=True)
        of_chunk = torch.searchsorted(behind, numbers, right=True).clamp(max=begin.shape[0] - 1)
        before = behind - count
        return cls(
            place=before[of_token] * chunk + tokens - begin[of_token],
            sequence=of_chunk,
            restart=before[of_chunk] == numbers,
            behind=behind,
            empty=count == 0,
            inside=None if read else (of_token > 0) & (of_token < begin.shape[0] - 1),
        )

    def run(self, inputs: Sequence[Tensor], state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """out [T, H, Dv] of q, k, v, alpha, eta and theta, and the final state, from state [N, H,
        2 D, Dv]."""
        places = self.sequence.shape[0] * chunk
        spread = []
        for x, rest in zip(inputs, (0, 0, 0, 0, 1, 0), strict=True):  # eta is 1 where no token is
            if self.inside is not None:
                shape = (-1, *[1] * (x.dim() - 1))
                x = torch.where(self.inside.view(shape), x, rest)
            around = x.new_full((places, *x.shape[1:]), rest)
            spread.append(around.index_copy(0, self.place, x)[None])
        live = spread[3].new_zeros(places).index_fill(0, self.place, 1)
        none = state.new_zeros((1, *state.shape[1:]))
        states = torch.cat([none, state, none])
        initial = states.index_select(0, self.sequence)
        out, found = TitansChunks.apply(*spread, initial, self.restart, live, chunk, True)
        final = torch.where(self.empty[:, None, None, None], states, found[self.behind])
        return out[0].index_select(0, self.place), final[1:-1]
