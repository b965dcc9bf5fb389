"""Host side of titans_memory: launches of forward and backward kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..._call.operator import record_of
from ..common import INTERPRETED, launch
from .common import Layout, states_of
from .titans_blocks import Gates
from .titans_memory_kernels import block_kernel, gradients_kernel, states_kernel

Record: Any = record_of("titans_memory")


class Call(Layout, Record):
    """The arguments of a call, and the kernel arguments derived from them."""

    @property
    def chunk(self) -> int:
        return min(self.chunk_size, max(self.tokens, 1))

    @property
    def block(self) -> int:
        """Tokens per block. With 32, tf32x3 products do not fit the registers of compute capability
        9.0."""
        return 16 if self.q.dtype == torch.float32 and not INTERPRETED.value else 32

    @property
    def parts(self) -> int:
        return triton.cdiv(self.chunk, self.block)

    @property
    def slots(self) -> int:
        """Upper bound on the number of blocks."""
        if self.packed:
            return (self.tokens // self.chunk + self.sequences) * self.parts
        whole, rest = divmod(self.tokens, self.chunk)
        return self.sequences * (whole * self.parts + triton.cdiv(rest, self.block))

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.sequences, self.heads, self.q.shape[-1], self.v.shape[-1])

    def gates(self) -> Gates:
        return Gates(*(t.contiguous() for t in (self.alpha, self.eta, self.theta)))

    @property
    def tile(self) -> int:
        """Rows and columns of state tiles."""
        if INTERPRETED.value:  # a tile costs milliseconds whatever its size
            return min(max(triton.next_power_of_2(max(self.state_shape[2:])), 16), 128)
        return 16 if self.q.dtype == torch.float32 else 32

    def scratch(self) -> Tensor:
        return self.float32(self.sequences, self.heads, 3, *self.state_shape[2:])

    def options(self) -> dict[str, Any]:
        return {
            "PRECISION": "tf32x3" if self.q.dtype == torch.float32 else "tf32",
            "HEAD_DIM": self.q.shape[-1],
            "VALUE_DIM": self.v.shape[-1],
            "BLOCK_T": self.block,
            "BLOCK_D": self.tile,
            "BLOCK_V": self.tile,
            "num_warps": 8,
            "num_stages": 1,
        }

    def place(self) -> tuple[Any, ...]:
        """Arguments common to all kernels, from cu_seqlens to value_dim."""
        return (
            self.cu_seqlens,
            self.tokens,
            self.sequences,
            self.chunk,
            self.parts,
            self.sequences.bit_length(),
            self.heads,
            self.slices,
            self.q.shape[-1],
            self.v.shape[-1],
        )

    @property
    def slices(self) -> int:
        return triton.cdiv(self.v.shape[-1], self.tile)


def _sweep_states(
    call: Call,
    out: Tensor | None,
    final: tuple[Tensor | None, Tensor | None],
    kept: tuple[Tensor | None, Tensor | None],
) -> None:
    states, us = kept
    launch(
        states_kernel,
        call.sequences * call.heads * call.slices,
        call.q,
        *(call.rows(t) for t in (call.q, call.k, call.v)),
        None if out is None else call.rows(out),
        call.gates(),
        *map(states_of, (call.initial_memory, call.initial_momentum, *final)),
        call.scratch(),
        states,
        None if us is None else call.rows(us),
        *call.place(),
        KEEP=out is None,
        **call.options(),
    )


def titans_memory(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call.of(a)
    out = call.new(call.v.shape, call.v.dtype)
    shape = call.state_shape if call.return_final_state else (0,)
    memory, momentum = call.float32(*shape), call.float32(*shape)
    wanted = (memory, momentum) if call.return_final_state else (None, None)
    _sweep_states(call, out, wanted, (None, None))
    return out, memory, momentum


def titans_memory_backward(a: Any) -> tuple[Tensor, ...]:
    call, dout = Call.of(a), a.dout
    inputs = (a.q, a.k, a.v, a.alpha, a.eta, a.theta)
    if dout is None:
        dout = call.v.new_zeros(call.v.shape[-1]).expand(call.v.shape)
    states = call.float32(call.slots, call.heads, 4, *call.state_shape[2:])
    us, dus = (call.float32(*call.v.shape) for _ in range(2))
    _sweep_states(call, None, (None, None), (states, us))
    gates = call.gates()
    dq, dk, dv, *dgates = (call.new(t.shape, t.dtype) for t in inputs)
    wanted = a.needs_dinitial_state and call.initial_memory is not None
    shape = call.state_shape if wanted else (0,)
    dinitial = (call.float32(*shape), call.float32(*shape))
    launch(
        gradients_kernel,
        call.sequences * call.heads * call.slices,
        call.q,
        *(call.rows(t) for t in (call.q, call.k, dout, dv)),
        gates,
        *map(states_of, (a.dmemory, a.dmomentum, *(dinitial if wanted else (None, None)))),
        call.scratch(),
        states,
        call.rows(dus),
        *call.place(),
        **call.options(),
    )
    launch(
        block_kernel,
        call.slots * call.heads,
        call.q,
        *(call.rows(t) for t in (call.q, call.k, dout, dq, dk)),
        gates,
        Gates(*dgates),
        states,
        *(call.rows(t) for t in (us, dus)),
        *call.place(),
        **call.options(),
    )
    return dq, dk, dv, *dgates, *dinitial
