"""linear_attention_decode: the next tokens of linear attention, at a constant cost per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autocast import Autocast
from ..check import check_bool, check_tensor, check_text
from ..dispatch import call
from ..library import TorchOp, register
from ..lowering import scale_or_default, widen
from ..reference.linear import linear_attention_decode as reference
from ..registry import Malformed, OpSpec, Sample, register_op
from .linear_attention import FeatureMap, flops
from .linear_attention_cases import Arguments, draw_state
from .rules import DECODE as OP
from .rules import check_decay_values, check_decode, check_slots


def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    feature_map: FeatureMap = "identity",
    normalize: bool = False,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Decode of :func:`linear_attention`: the next tokens, with states in slots, in place.

    Request b continues from the state in slot state_indices[b], which is updated in place. The
    result is that of :func:`linear_attention` with the same tokens and initial_state.

    Args:
        q: ``[B, S, H, D]``, float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256. S is 1, or more for several tokens.
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H (GQA, MQA).
        state: float32 ``[slots, H, F, Dv]``, with normalize ``[slots, H, F, Dv + 1]``, as
            :func:`linear_attention` returns it; updated in place. The rows of a head have no
            gaps, each element at an address of its own and none in another argument.
        log_decay: ``[H]`` or ``[B, S, H]``, not positive, as in :func:`linear_attention`.
        feature_map, normalize: as in :func:`linear_attention`; those with which the state was made.
        state_indices: int32 ``[B]``, the slot of each request; -1 skips a request (padding of a
            batch): its out is 0 and no state changes. No slot twice. None: slot b for request b.
        scale: None = 1/sqrt(D), as in :func:`linear_attention`.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, S, H, Dv]`` in the dtype of q. There is no gradient: inputs that require one are
        refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is written. On a GPU a slot
            out of range is skipped like -1, and a repeated slot is undefined.

    Complexity: 4 B S H F Dv operations; reads and writes each state once, whatever S.

    Paper: Transformers are RNNs (Katharopoulos et al. 2020), section 3.4; slots as in the serving
    of MiniMax-01 (2025).

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.randn(3, 2, 10, 4, 16).unbind()
        >>> slopes = tm.lightning_slopes(4)
        >>> state = torch.zeros(8, 4, 16, 16)
        >>> slots = torch.tensor([5, 2], dtype=torch.int32)
        >>> steps = [tm.linear_attention_decode(
        ...     *(x[:, t:t + 1] for x in (q, k, v)), state, log_decay=-slopes,
        ...     state_indices=slots, scale=1.0) for t in range(10)]
        >>> torch.allclose(torch.cat(steps, 1), tm.lightning_attention(q, k, v, slopes), atol=1e-4)
        True
    """
    (out,) = call(
        SPEC,
        lower(
            q,
            k,
            v,
            state,
            log_decay=log_decay,
            feature_map=feature_map,
            normalize=normalize,
            state_indices=state_indices,
            scale=scale,
        ),
        backend,
    )
    return out


def lower(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    feature_map: str = "identity",
    normalize: bool = False,
    state_indices: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    for name, t in (("q", q), ("k", k), ("v", v), ("state", state)):
        check_tensor(OP, name, t)
    for name, option in (("log_decay", log_decay), ("state_indices", state_indices)):
        if option is not None:
            check_tensor(OP, name, option, optional=True)
    check_text(OP, "feature_map", feature_map)
    check_bool(OP, "normalize", normalize)
    return (
        q,
        k,
        v,
        state,
        None if log_decay is None else widen(log_decay, q),
        feature_map,
        scale_or_default(OP, scale, q),
        normalize,
        state_indices,
    )


def _check_values(*lowered: Any) -> None:
    a = FORWARD.record(*lowered)
    check_decay_values(OP, a.log_decay)
    if a.state_indices is not None:
        check_slots(a.state_indices, a.state.shape[0])


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _flops(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *lowered: Any) -> float:
    return flops(q, k, v, *lowered)


def _sample(
    b: int = 3,
    s: int = 1,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
    slots: tuple[int, ...] | None = None,
    decay: str | None = "head",
    feature_map: str = "identity",
    normalize: bool = False,
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        q, k, v = (
            torch.randn(b, s, heads, size, generator=g).to(dtype)
            for heads, size in ((h, d), (hk, d), (hk, dv))
        )
        kwargs: dict[str, Any] = {"feature_map": feature_map, "normalize": normalize}
        wide = torch.promote_types(dtype, torch.float32)
        if decay is not None:
            shape = (h,) if decay == "head" else (b, s, h)
            kwargs["log_decay"] = -torch.rand(shape, generator=g).to(wide)
        count = b
        if slots is not None:
            kwargs["state_indices"] = torch.tensor(slots, dtype=torch.int32)
            count = 5
        state = draw_state((count, h, d, dv), feature_map, normalize, dtype, g)
        return (q, k, v, state), kwargs

    return make


def _set(index: int, change: Any) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[index] = change(args[index])

    return edit


def _slots(*found: int, dtype: torch.dtype = torch.int32) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        kwargs["state_indices"] = torch.tensor(found, dtype=dtype)

    return edit


def _two_slots(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[3] = args[3][:2]
    del kwargs["state_indices"]


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "v")),
        check=check_decode,
        check_values=_check_values,
        fake=_fake,
        triton="linear.linear_attention_decode:linear_attention_decode",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="linear",
        function=linear_attention_decode,
        lower=lower,
        reference=reference.linear_attention_decode,
        plain=reference.linear_attention_decode,
        forward=FORWARD,
        backward=None,
        samples=(
            Sample("slots", _sample(slots=(4, -1, 1))),
            Sample("in order", _sample(hk=4, d=24, dv=40, decay=None)),
            Sample(
                "several tokens",
                _sample(
                    s=5, hk=1, slots=(0, 3, 2), decay="token", feature_map="elu1", normalize=True
                ),
            ),
            Sample("silu", _sample(s=2, d=20, dv=9, feature_map="silu", decay="token")),
            Sample("relu", _sample(b=1, h=3, hk=1, d=7, dv=5, feature_map="relu")),
            Sample("taylor2", _sample(d=16, dv=20, slots=(2, 1, 0), feature_map="taylor2")),
            Sample(
                "taylor2, normalized",
                _sample(s=3, d=9, dv=16, feature_map="taylor2", normalize=True, decay="token"),
            ),
            Sample("wide heads", _sample(b=1, h=2, hk=1, d=200, dv=136)),
            Sample("all skipped", _sample(slots=(-1, -1, -1))),
            Sample("no tokens", _sample(s=0)),
            Sample("no requests", _sample(b=0, slots=())),
        ),
        # Edits of the first sample: q [3, 1, 4, 32], k and v [3, 1, 2, 32], state [5, 4, 32, 32].
        malformed=(
            Malformed(
                "rank", "q: must have 4 dimensions [B, S, H, D]; got 3", _set(0, lambda q: q[0])
            ),
            Malformed(
                "lengths differ",
                "k: must have the length of q, 1; got 0",
                lambda a, k: a.__setitem__(slice(1, 3), [t[:, 1:] for t in a[1:3]]),
            ),
            Malformed(
                "state rank",
                "state: must have shape [slots, 4, 32, 32]; got [4, 32, 32]",
                _set(3, lambda s: s[0]),
            ),
            Malformed(
                "state shape",
                "state: must have shape [slots, 4, 32, 32]; got [5, 4, 32, 31]",
                _set(3, lambda s: s[..., 1:]),
            ),
            Malformed(
                "state dtype", "state: must be float32; got float16", _set(3, lambda s: s.half())
            ),
            Malformed(
                "state layout",
                "state: must have the rows of a head without gaps; strides; got [4096, 1024, 1, ",
                _set(3, lambda s: s.transpose(-1, -2)),
            ),
            Malformed(
                "expanded state",
                "state: must have each element at an address of its own; strides; got [0, 1024, ",
                _set(3, lambda s: s[:1].expand(5, -1, -1, -1)),
            ),
            Malformed(
                "state over v",
                "state: must not share memory with v; strides; got [4096, 1024, 32, 1]",
                lambda a, k: a.__setitem__(2, a[3].flatten()[64:256].view(3, 1, 2, 32)),
            ),
            Malformed(
                "too few slots",
                "state: must have a slot for each sequence, 3, without state_indices; got 2",
                _two_slots,
            ),
            Malformed(
                "log_decay shape",
                "log_decay: must have shape [4] or [3, 1, 4]; got [3, 4]",
                lambda a, k: k.update(log_decay=torch.zeros(3, 4)),
            ),
            Malformed(
                "indices dtype",
                "state_indices: must be int32; got int64",
                _slots(0, 1, 2, dtype=torch.int64),
            ),
            Malformed("indices shape", "state_indices: must have shape [3]; got [2]", _slots(0, 1)),
            Malformed(
                "log_decay positive",
                "log_decay: must not be positive; largest; got 2",
                lambda a, k: k.update(log_decay=torch.tensor([-1.0, 0.0, 1.0, 2.0])),
                values=True,
            ),
            Malformed(
                "slot out of range",
                "state_indices: must be -1 (skip) or a slot below 5; got 5",
                _slots(0, 5, 1),
                values=True,
            ),
            Malformed(
                "negative slot",
                "state_indices: must be -1 (skip) or a slot below 5; got -2",
                _slots(0, -2, 1),
                values=True,
            ),
            Malformed(
                "repeated slot",
                "state_indices: must not repeat a slot; got [1, 0, 1]",
                _slots(1, 0, 1),
                values=True,
            ),
        ),
        differentiable=(),
        paper="Transformers are RNNs (Katharopoulos et al. 2020); MiniMax-01 (2025)",
        flops=_flops,
    )
)
