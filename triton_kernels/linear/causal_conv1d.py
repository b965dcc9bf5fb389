"""Host side of causal_conv1d: launches of forward and backward kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..._call.operator import record_of
from ..common import INTERPRETED, launch
from .conv_kernels import (
    ConvStates,
    Filter,
    TokenRows,
    filter_kernel,
    final_kernel,
    forward_kernel,
    initial_kernel,
    input_kernel,
)

Record: Any = record_of("causal_conv1d")
# Tokens of a tile in the backward, whose sums are one part. An interpreter's tile costs
# milliseconds whatever its size.
ROWS = 64 if INTERPRETED.value else 16
CHANNELS = 64


class Call(Record):
    """The arguments of a call, and the kernel arguments derived from them."""

    @classmethod
    def of(cls, a: Any) -> Call:
        return cls(*(getattr(a, name) for name in cls._fields))

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def sequences(self) -> int:
        return int(self.cu_seqlens.shape[0]) - 1 if self.packed else int(self.x.shape[0])

    @property
    def channels(self) -> int:
        return int(self.x.shape[-1])

    @property
    def width(self) -> int:
        return int(self.weight.shape[1])

    @property
    def rows(self) -> int:
        return int(self.x.shape[:-1].numel())

    @property
    def block_c(self) -> int:
        most = 1024 if INTERPRETED.value else CHANNELS
        return min(triton.next_power_of_2(max(self.channels, 1)), most)

    @property
    def slices(self) -> int:
        return int(triton.cdiv(self.channels, self.block_c))

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.sequences, self.channels, self.width - 1

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.rows, int(self.x.shape[-2])

    def tokens(self, t: Tensor) -> TokenRows:
        return TokenRows(t, 0 if self.packed else t.stride(0), t.stride(-2))

    @property
    def taps(self) -> Filter:
        return filter_of(self.weight, self.bias)

    def tiles(self, kernel: Any, block_t: int, *args: Any, **options: Any) -> None:
        """Launches a kernel for each tile of tokens and channels."""
        launch(
            kernel,
            triton.cdiv(self.rows, block_t) * self.slices,
            self.x,
            *args,
            self.cu_seqlens,
            *self.lengths,
            self.sequences,
            self.sequences.bit_length(),
            self.slices,
            self.channels,
            WIDTH=self.width,
            BLOCK_T=block_t,
            BLOCK_C=self.block_c,
            num_warps=4,
            **options,
        )

    def each_sequence(self, kernel: Any, *args: Any) -> None:
        launch(
            kernel,
            self.sequences * self.slices,
            self.x,
            *args,
            self.cu_seqlens,
            *self.lengths,
            self.slices,
            self.channels,
            WIDTH=self.width,
            BLOCK_C=self.block_c,
            num_warps=2,
        )


def filter_of(weight: Tensor, bias: Tensor | None) -> Filter:
    channel, tap = weight.stride()
    return Filter(weight, channel, tap, bias, 0 if bias is None else bias.stride(0))


def states_of(t: Tensor | None) -> ConvStates | None:
    return None if t is None or t.numel() == 0 else ConvStates(t, *t.stride())


def causal_conv1d(a: Any) -> tuple[Tensor, Tensor]:
    call = Call.of(a)
    x, state = call.x, states_of(call.initial_state)
    out = x.new_empty(x.shape)
    final = x.new_empty(call.state_shape if call.return_final_state else (0,))
    if call.sequences == 0:
        return out.zero_(), final
    silu = call.activation == "silu"
    args = call.tokens(x), call.tokens(out), state, call.taps
    call.tiles(forward_kernel, ROWS, *args, SILU=silu)
    if final.numel() > 0:
        call.each_sequence(final_kernel, call.tokens(x), state, states_of(final))
    return out, final


def causal_conv1d_backward(a: Any) -> tuple[Tensor, ...]:
    call, dout = Call.of(a), a.dout
    x, weight, bias = call.x, call.weight, call.bias
    dx = x.new_empty(x.shape)
    dweight = weight.new_empty(weight.shape)
    dbias = weight.new_empty(0, dtype=torch.float32) if bias is None else bias.new_empty(bias.shape)
    wanted = a.needs_dinitial_state and call.initial_state is not None
    dinitial = x.new_empty(call.state_shape if wanted else (0,))
    if call.sequences == 0 or call.channels == 0:
        for t in (dx, dweight, dbias):
            t.zero_()
        return dx, dweight, dbias, dinitial
    if dout is None:
        dout = x.new_zeros(x.shape[-1]).expand(x.shape)
    wide = {"dtype": torch.float32}
    dpre = x.new_empty(call.rows, call.channels, **wide)
    parts = x.new_empty(triton.cdiv(call.rows, ROWS), call.width + 1, call.channels, **wide)
    state, dfinal = states_of(call.initial_state), states_of(a.dfinal_state)
    given = call.tokens(x), call.tokens(dout), dpre, state, call.taps, parts
    call.tiles(filter_kernel, ROWS, *given, SILU=call.activation == "silu")
    call.tiles(input_kernel, ROWS, dpre, call.tokens(dx), dfinal, call.taps)
    if dinitial.numel() > 0:
        call.each_sequence(initial_kernel, dpre, states_of(dinitial), dfinal, call.taps)
    sums = parts.sum(0)
    dweight.copy_(sums[:-1].T)
    if bias is not None:
        dbias.copy_(sums[-1])
    return dx, dweight, dbias, dinitial
