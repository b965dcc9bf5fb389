"""titans_memory_decode: the next tokens of titans_memory, at a constant cost per token."""

from __future__ import annotations

import torch
from torch import Tensor

from .._call.autocast import Autocast
from .._call.rules import check_written
from .._check import (
    as_int,
    check,
    check_device_of_q,
    check_dtype,
    check_dtype_of,
    check_last_contiguous,
    check_tensor,
    check_wide,
    fail,
    reads_values,
    show,
)
from ._state import check_slot_values

OP = "titans_memory_decode"


@Autocast(lower=("q", "k", "v")).applied
def titans_memory_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    memory: Tensor,
    momentum: Tensor,
    filled: Tensor,
    *,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    chunk_size: int = 64,
    state_indices: Tensor | None = None,
) -> Tensor:
    r"""Decode step of :func:`titans_memory`, updating states in slots in place.

    Request b continues from the state in slot state_indices[b], which is updated in place. Chunks
    continue across calls: the results equal one call of :func:`titans_memory` with all tokens since
    filled was 0. A state returned by :func:`titans_memory` is used as memory and momentum with
    filled 0. PyTorch computes this on every device: there is no argument `backend`.

    Args:
        q, k: ``[B, S, H, D]`` float16, bfloat16, float32 or float64. S is 1, or more for several
            tokens, one after the other.
        v: ``[B, S, H, Dv]`` in the dtype of q.
        start: float32 (float64 with float64 q) ``[slots, H, D, Dv]``, the memory before the chunk
            of the last token. It is not read where filled is 0.
        memory, momentum: as start, the values after the last token; 0 before the first token.
        filled: int32 ``[slots]``, tokens of the chunk so far, 0 to chunk_size - 1. All four are
            updated in place; no two elements overlap, and none is shared with another argument.
        alpha, eta, theta: ``[B, S, H]`` of any floating-point dtype.
        chunk_size: as in :func:`titans_memory`.
        state_indices: int32 ``[B]``, the slot of each request; -1 skips a request (padding of a
            batch): its out is 0 and no state changes. No slot twice. None: slot b for request b.

    Returns:
        out ``[B, S, H, Dv]`` in the dtype of q. There is no gradient: inputs that require one are
        refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is written. On a GPU a slot
            out of range is skipped like -1, and a repeated slot is undefined.

    Complexity: 10 B S H D Dv operations; reads and writes each state once for each token.

    Paper: Titans: Learning to Memorize at Test Time (Behrouz et al. 2025), section 3.1.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 10, 4, 16), dim=-1)
        >>> gates = dict(zip(("alpha", "eta", "theta"), 0.1 * torch.rand(3, 2, 10, 4)))
        >>> start, memory, momentum = torch.zeros(3, 8, 4, 16, 16)
        >>> filled = torch.zeros(8, dtype=torch.int32)
        >>> slots = torch.tensor([5, 2], dtype=torch.int32)
        >>> steps = [tm.titans_memory_decode(
        ...     *(x[:, t:t + 1] for x in (q, k, v)), start, memory, momentum, filled,
        ...     **{n: g[:, t:t + 1] for n, g in gates.items()}, chunk_size=4,
        ...     state_indices=slots) for t in range(10)]
        >>> whole = tm.titans_memory(q, k, v, **gates, chunk_size=4)
        >>> torch.allclose(torch.cat(steps, 1), whole, atol=1e-5), filled[slots].tolist()
        (True, [2, 2])
    """
    gates = {"alpha": alpha, "eta": eta, "theta": theta}
    states = {"start": start, "memory": memory, "momentum": momentum}
    for name, t in (("q", q), ("k", k), ("v", v), *gates.items()):
        check_tensor(OP, name, t)
    _check_queries(q, k, v)
    _check_gates(gates, q)
    chunk_size = as_int(OP, "chunk_size", chunk_size, minimum=1)
    _check_states(states, filled, q, v)
    batch, slots, wide = q.shape[0], memory.shape[0], memory.dtype
    check_tensor(OP, "state_indices", state_indices, optional=True)
    _check_slots(slots, state_indices, q)
    inputs = {"q": q, "k": k, "v": v, **gates}
    written = {**states, "filled": filled}
    for name, t in written.items():
        others = {n: x for n, x in written.items() if n != name}
        check_written(OP, name, t, {**inputs, "state_indices": state_indices, **others})
    for name, t in {**inputs, **states}.items():
        if torch.is_grad_enabled() and t.requires_grad:
            rule = "must not require a gradient, as the call writes into memory"
            fail(OP, name, rule, t.requires_grad)
    if reads_values(q):
        if state_indices is not None:
            check_slot_values(OP, state_indices, slots)
        _check_filled(filled, state_indices, batch, chunk_size)

    if batch == 0 or slots == 0:
        return torch.zeros_like(v)
    given = [t.to(wide) for t in (q, k, v, alpha, eta, theta)]
    if state_indices is None:
        rows = torch.arange(batch, device=q.device)
        live = torch.ones_like(rows, dtype=torch.bool)
    else:
        # A skipped request repeats a live one, so both write the same values.
        live = (state_indices >= 0) & (state_indices < slots)
        source = torch.where(live, torch.arange(batch, device=q.device), live.int().argmax())
        given = [t[source] for t in given]
        rows = state_indices[source].long().clamp(0, slots - 1)
    before = [t[rows] for t in written.values()]
    out, after = _steps(given, before, chunk_size)
    for t, old, new in zip(written.values(), before, after, strict=True):
        t[rows] = torch.where(live.any(), new, old)
    return torch.where(_beside(live, out), out, 0).to(q.dtype)


def _steps(
    inputs: list[Tensor], states: list[Tensor], chunk_size: int
) -> tuple[Tensor, list[Tensor]]:
    """out [B, S, H, Dv] and the states after the last token."""
    start, memory, momentum, filled = states
    outs = []
    for q, k, v, alpha, eta, theta in zip(*(t.unbind(1) for t in inputs), strict=True):
        start = torch.where(_beside(filled == 0, memory), memory, start)
        error = k[:, :, None] @ start - v[:, :, None]
        alpha, eta, theta = (_beside(gate, memory) for gate in (alpha, eta, theta))
        momentum = eta * momentum - theta * (k[..., None] * error)
        memory = (1 - alpha) * memory + momentum
        outs.append((q[:, :, None] @ memory)[:, :, 0])
        filled = (filled + 1) % chunk_size
    out = torch.stack(outs, 1) if outs else torch.zeros_like(inputs[2])
    return out, [start, memory, momentum, filled]


def _beside(t: Tensor, like: Tensor) -> Tensor:
    """Reshapes t to the number of dimensions of another tensor."""
    return t.reshape(*t.shape, *[1] * (like.dim() - t.dim()))


def _check_queries(q: Tensor, k: Tensor, v: Tensor) -> None:
    check(q.dim() == 4, OP, "q", "must have 4 dimensions [B, S, H, D]", q.dim())
    check_dtype(OP, "q", q, float64=True)
    check(q.shape[-1] > 0, OP, "q", "must have a head dimension of at least 1", q.shape[-1])
    for name, t in (("k", k), ("v", v)):
        check_dtype_of(OP, name, t, "q", q)
        check_device_of_q(OP, name, t, q)
    if k.shape != q.shape:
        fail(OP, "k", f"must have the shape of q, {show(q.shape)}", k.shape)
    if v.dim() != q.dim() or v.shape[:-1] != q.shape[:-1]:
        rule = f"must have the shape of q up to the head dimension, {show(q.shape)}"
        fail(OP, "v", rule, v.shape)
    check(v.shape[-1] > 0, OP, "v", "must have a head dimension of at least 1", v.shape[-1])


def _check_gates(gates: dict[str, Tensor], q: Tensor) -> None:
    for name, t in gates.items():
        check(t.is_floating_point(), OP, name, "must be a floating-point tensor", t.dtype)
        if t.shape != q.shape[:-1]:
            fail(OP, name, f"must have shape {show(q.shape[:-1])}", t.shape)
        check_device_of_q(OP, name, t, q)


def _check_states(states: dict[str, Tensor], filled: Tensor, q: Tensor, v: Tensor) -> None:
    head = (*q.shape[2:], v.shape[-1])
    for name, t in states.items():
        check_tensor(OP, name, t)
        if t.dim() != 4 or tuple(t.shape[1:]) != head:
            rule = f"must have shape [slots, {', '.join(map(str, head))}]"
            fail(OP, name, rule, t.shape)
        check_wide(OP, name, t, q)
        check_device_of_q(OP, name, t, q)
        slots = states["start"].shape[0]
        check(t.shape[0] == slots, OP, name, f"must have the slots of start, {slots}", t.shape[0])
    check_tensor(OP, "filled", filled)
    check(filled.dtype == torch.int32, OP, "filled", "must be int32", filled.dtype)
    if tuple(filled.shape) != (slots,):
        fail(OP, "filled", f"must have shape [{slots}]", filled.shape)
    check_device_of_q(OP, "filled", filled, q)


def _check_slots(slots: int, state_indices: Tensor | None, q: Tensor) -> None:
    batch = q.shape[0]
    if state_indices is None:
        if slots < batch:
            rule = f"must have a slot for each sequence, {batch}, without state_indices"
            fail(OP, "start", rule, slots)
        return
    dtype = state_indices.dtype
    check(dtype == torch.int32, OP, "state_indices", "must be int32", dtype)
    if tuple(state_indices.shape) != (batch,):
        fail(OP, "state_indices", f"must have shape [{batch}]", state_indices.shape)
    check_last_contiguous(OP, "state_indices", state_indices)
    check_device_of_q(OP, "state_indices", state_indices, q)


def _check_filled(filled: Tensor, slots: Tensor | None, batch: int, chunk_size: int) -> None:
    used = filled[:batch] if slots is None else filled[slots[slots >= 0].long()]
    wrong = used[(used < 0) | (used >= chunk_size)]
    if wrong.numel() > 0:
        fail(OP, "filled", f"must be 0 to {chunk_size - 1}", int(wrong[0]))
