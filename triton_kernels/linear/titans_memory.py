"""Host side of titans_memory: launches of forward and backward kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..._call.operator import record_of
from ..common import INTERPRETED, Rows, launch
from .common import States
from .titans_memory_kernels import block_kernel, gradients_kernel, states_kernel

Record: Any = record_of("titans_memory")


class Call(Record):
    """The arguments of a call, and the kernel arguments derived from them."""

    @classmethod
    def of(cls, a: Any) -> Call:
        """The call of a record of the forward or of the backward."""
        return cls(*(getattr(a, name) for name in cls._fields))

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def tokens(self) -> int:
        return self.q.shape[-3]

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

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

    def new(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Allocates an output. Tokens outside all packed sequences, which no program writes, are
        0."""
        allocate = self.q.new_zeros if self.packed else self.q.new_empty
        return allocate(like.shape, dtype=dtype or like.dtype)

    def float32(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def rows(self, t: Tensor) -> Rows:
        return Rows(t, 0 if self.packed else t.stride(0), t.stride(-3), t.stride(-2))

    def gates(self) -> list[Tensor]:
        return [t.contiguous() for t in (self.alpha, self.eta, self.theta)]

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


def _states(t: Tensor | None) -> States | None:
    return None if t is None else States(t, t.stride(0), t.stride(1))


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
        *call.gates(),
        *map(_states, (call.initial_memory, call.initial_momentum, *final)),
        call.scratch(),
        states,
        None if us is None else call.rows(us),
        *call.place(),
        KEEP=out is None,
        **call.options(),
    )


def titans_memory(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call.of(a)
    out = call.new(call.v)
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
    dq, dk, dv, dalpha, deta, dtheta = (call.new(t) for t in inputs)
    wanted = a.needs_dinitial_state and call.initial_memory is not None
    shape = call.state_shape if wanted else (0,)
    dinitial = (call.float32(*shape), call.float32(*shape))
    gates = call.gates()
    launch(
        gradients_kernel,
        call.sequences * call.heads * call.slices,
        call.q,
        *(call.rows(t) for t in (call.q, call.k, dout, dv)),
        *gates,
        *map(_states, (a.dmemory, a.dmomentum, *(dinitial if wanted else (None, None)))),
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
        *gates,
        dalpha,
        deta,
        dtheta,
        states,
        *(call.rows(t) for t in (us, dus)),
        *call.place(),
        **call.options(),
    )
    return dq, dk, dv, dalpha, deta, dtheta, *dinitial
