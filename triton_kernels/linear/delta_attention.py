"""Host side of delta_attention: launches of forward and backward kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..._call.operator import record_of
from ..common import INTERPRETED, MAX_REGISTERS, launch
from .common import Layout, States, states_of
from .delta_chunks import L2NORM_EPSILON
from .delta_kernels import chunk_kernel, gradients_kernel, states_kernel

Record: Any = record_of("delta_attention")
BLOCK_T = 16  # tokens per chunk


class Call(Layout, Record):
    """The arguments of a call, and the kernel arguments derived from them. Without beta there is no
    correction."""

    @property
    def heads(self) -> int:
        return self.v.shape[-2]

    @property
    def group(self) -> int:
        """Value heads per key head."""
        return self.heads // max(self.q.shape[-2], 1)

    @property
    def per_sequence(self) -> int:
        return triton.cdiv(self.tokens, BLOCK_T)

    @property
    def slots(self) -> int:
        """Upper bound on the number of chunks."""
        if self.packed:
            return self.tokens // BLOCK_T + self.sequences
        return self.sequences * self.per_sequence

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.sequences, self.heads, self.q.shape[-1], self.v.shape[-1])

    @property
    def columns(self) -> int:
        """Columns of a state per program."""
        if INTERPRETED.value:  # a tile costs milliseconds whatever its size
            return min(max(triton.next_power_of_2(self.v.shape[-1]), 16), 128)
        return 32

    @property
    def slices(self) -> int:
        return triton.cdiv(self.v.shape[-1], self.columns)

    @property
    def kind(self) -> str:
        if self.log_decay is None:
            return "none"
        return "channel" if self.log_decay.dim() == self.q.dim() else "head"

    @property
    def beta_rows(self) -> Tensor | None:
        return None if self.beta is None else self.beta.contiguous()

    @property
    def decay(self) -> Tensor | None:
        return None if self.log_decay is None else self.log_decay.contiguous()

    def place(self) -> tuple[Any, ...]:
        """Arguments common to all kernels, from cu_seqlens to scale."""
        return (
            self.cu_seqlens,
            self.tokens,
            self.sequences,
            self.per_sequence,
            self.sequences.bit_length(),
            self.heads,
            self.group,
            self.slices,
            self.q.shape[-1],
            self.v.shape[-1],
            self.scale,
        )

    def scratch(self) -> Tensor:
        return self.float32(*self.state_shape)

    def options(self) -> dict[str, Any]:
        whole = max(triton.next_power_of_2(self.q.shape[-1]), 16)
        return {
            "L2NORM": self.qk_l2norm,
            "DECAY": self.kind,
            "PRECISION": "tf32x3",
            "HEAD_DIM": self.q.shape[-1],
            "VALUE_DIM": self.v.shape[-1],
            "BLOCK_T": BLOCK_T,
            "BLOCK_D": whole if INTERPRETED.value else 32,
            "BLOCK_V": self.columns,
            "num_warps": 4,
            "num_stages": 1,
            # Without this bound ptxas aims at 128 registers on 9.0, and spills.
            **({"maxnreg": MAX_REGISTERS} if self.beta is None else {}),
        }


def _sweep_states(
    call: Call, out: Tensor | None, final: Tensor | None, states: Tensor | None, ys: Tensor | None
) -> None:
    launch(
        states_kernel,
        call.sequences * call.heads * call.slices,
        call.q,
        *(call.rows(t) for t in (call.q, call.k, call.v)),
        None if out is None else call.rows(out),
        call.beta_rows,
        call.decay,
        states_of(call.initial_state),
        states_of(final),
        call.scratch(),
        states,
        None if ys is None else call.rows(ys),
        *call.place(),
        KEEP=out is None,
        **call.options(),
    )


def delta_attention(a: Any) -> tuple[Tensor, Tensor]:
    return forward_of(Call.of(a))


def forward_of(call: Call) -> tuple[Tensor, Tensor]:
    out = call.new(call.v.shape, call.v.dtype)
    final = call.float32(*(call.state_shape if call.return_final_state else (0,)))
    _sweep_states(call, out, final if call.return_final_state else None, None, None)
    return out, final


def delta_attention_backward(a: Any) -> tuple[Tensor, ...]:
    needs = a.needs_dlog_decay, a.needs_dinitial_state
    dq, dk, dv, dbetas, *rest = backward_of(Call.of(a), a.dout, a.dfinal_state, *needs)
    return dq, dk, dv, dbetas.sum(0), *rest


def backward_of(
    call: Call,
    dout: Tensor | None,
    dfinal_state: Tensor | None,
    needs_dlog_decay: bool,
    needs_dinitial_state: bool,
) -> tuple[Tensor, ...]:
    """dbeta is a part for each slice of the columns, [slices, ...]; [0] without beta."""
    if dout is None:
        dout = call.v.new_zeros(call.v.shape[-1]).expand(call.v.shape)
    states, dstates = (call.float32(call.slots, *call.state_shape[1:]) for _ in range(2))
    ys, dys, dbetas = None, None, call.float32(0)
    if call.beta is not None:
        ys, dys = (call.float32(*call.v.shape) for _ in range(2))
        dbetas = call.new((call.slices, *call.beta.shape), call.beta.dtype)
    _sweep_states(call, None, None, states, ys)
    dv = call.new(call.v.shape, call.v.dtype)
    wanted = needs_dinitial_state and call.initial_state is not None
    dinitial = call.float32(*(call.state_shape if wanted else (0,)))
    launch(
        gradients_kernel,
        call.sequences * call.heads * call.slices,
        call.q,
        *(call.rows(t) for t in (call.q, call.k, dout, dv)),
        call.beta_rows,
        call.decay,
        states_of(dfinal_state),
        states_of(dinitial if wanted else None),
        call.scratch(),
        dstates,
        *(None if t is None else call.rows(t) for t in (ys, dys)),
        States(dbetas, dbetas.stride(0), 0),
        *call.place(),
        **call.options(),
    )
    shape = (*call.v.shape[:-1], call.q.shape[-1])
    dq, dk = (call.new(shape, torch.float32) for _ in range(2))
    wants_decay = needs_dlog_decay and call.log_decay is not None
    ddecay = call.new(call.log_decay.shape if wants_decay else (0,), torch.float32)
    launch(
        chunk_kernel,
        call.slots * call.heads,
        call.q,
        *(call.rows(t) for t in (call.q, call.k, dout, dq, dk)),
        call.beta_rows,
        call.decay,
        ddecay if wants_decay else None,
        states,
        dstates,
        call.rows(call.v if ys is None else ys),
        None if dys is None else call.rows(dys),
        *call.place(),
        **call.options() | ({} if INTERPRETED.value else {"BLOCK_V": 16}),
    )
    gradients = (of_inputs(call, x, dx) for x, dx in ((call.q, dq), (call.k, dk)))
    return *gradients, dv, dbetas, ddecay, dinitial


def of_inputs(call: Call, x: Tensor, dx: Tensor) -> Tensor:
    """Gradient of q or k, summed over value heads, from that of the normalized rows."""
    dx = dx.unflatten(-2, (x.shape[-2], call.group)).sum(-2)
    if call.qk_l2norm:
        x = x.float()
        norm = 1 / (x.square().sum(-1, keepdim=True) + L2NORM_EPSILON.value).sqrt()
        x = x * norm
        dx = (dx - (dx * x).sum(-1, keepdim=True) * x) * norm
    return dx.to(call.q.dtype)
