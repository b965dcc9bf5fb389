"""Host side of linear attention: plans and launches of forward and backward kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._call.operator import record_of
from ...linear._state import feature_dim
from ..common import INTERPRETED, MAX_REGISTERS, launch
from ..tuned import tuned
from .common import Form, Inputs, Layout, form_of, log_decay_of, states_of
from .decay_gradient import decay_kernel, sum_chunks_kernel
from .delta_attention import Call as DeltaCall
from .delta_attention import backward_of, forward_of
from .linear_attention_backward import delta_kernel, keys_kernel, queries_kernel, values_kernel
from .linear_attention_forward import TILES_AGAIN, results_again_kernel, results_kernel
from .states import scan_kernel, sums_kernel

ELEMENTS = 1024  # elements of a state per program of the scan


class Tiles(NamedTuple):
    tokens: int  # per chunk
    features: int
    columns: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """Tiles per kernel. backward, keys and decay have the same chunk length."""

    forward: Tiles
    backward: Tiles
    keys: Tiles
    decay: Tiles


# Keyed by element size in bytes: the largest tiles that do not spill on 8.0 and 9.0, for any
# feature map and form of decay. 64 rows are the minimum M of a 9.0 MMA.
PLANS = {
    2: Plan(
        Tiles(64, 64, 64, 4, 2),
        Tiles(64, 64, 64, 8, 2),
        Tiles(64, 64, 32, 8, 2),
        Tiles(64, 32, 32, 8, 2),
    ),
    4: Plan(
        Tiles(32, 32, 32, 4, 2),
        Tiles(32, 32, 32, 8, 2),
        Tiles(32, 32, 32, 8, 2),
        Tiles(32, 32, 32, 8, 2),
    ),
}


Record: Any = record_of("linear_attention")


class Call(Layout, Record):
    """The arguments of a call, and the kernel arguments derived from them."""

    @property
    def kv_heads(self) -> int:
        return self.k.shape[-2]

    @property
    def columns(self) -> int:
        return self.v.shape[-1] + int(self.normalize)

    @property
    def features(self) -> int:
        return feature_dim(self.feature_map, self.q.shape[-1])

    @property
    def statistics_shape(self) -> Sequence[int]:
        lead = () if self.packed else (self.sequences,)
        return (*lead, self.heads, self.tokens)

    @property
    def state_shape(self) -> Sequence[int]:
        return (self.sequences, self.heads, self.features, self.columns)

    def plan(self) -> Plan:
        if INTERPRETED.value:
            # In the interpreter a tile costs milliseconds whatever its size.
            tokens = min(max(triton.next_power_of_2(self.tokens) // 16, 64), 256)
            plan = Plan(*[Tiles(tokens, 128, 128, 4, 1)] * 4)
        else:
            plan = PLANS[self.q.element_size()]
            if max(self.q.shape[-1], self.v.shape[-1]) > 128:
                plan = plan._replace(forward=plan.forward._replace(num_warps=8))
        if self.chunk_size is None:
            return plan
        return Plan(*(t._replace(tokens=min(t.tokens, self.chunk_size)) for t in plan))

    def slots(self, tiles: Tiles) -> int:
        """Upper bound on the number of chunks."""
        if not self.packed:
            return self.sequences * self.per_sequence(tiles)
        return self.tokens // tiles.tokens + self.sequences if self.sequences else 0

    def per_sequence(self, tiles: Tiles) -> int:
        return triton.cdiv(self.tokens, tiles.tokens)

    def inputs(self, *gradients: Any) -> Inputs:
        """gradients: dout, normalizer and delta, which only the backward has."""
        decay, _ = log_decay_of(self.log_decay)
        q, k, v = map(self.rows, (self.q, self.k, self.v))
        return Inputs(q, k, v, decay, self.scale, self.cu_seqlens, *gradients)

    def lengths(self, tiles: Tiles) -> Sequence[int]:
        """Lengths common to all kernels, from tokens to heads."""
        per_sequence = self.per_sequence(tiles)
        return self.tokens, self.sequences, per_sequence, self.sequences.bit_length(), self.heads

    def sizes(self, tiles: Tiles) -> Sequence[int]:
        """Lengths of kernels that read decay and several heads, from decay_batch to group."""
        _, decay_batch = log_decay_of(self.log_decay)
        return decay_batch, *self.lengths(tiles), self.heads // max(self.kv_heads, 1)

    def form(self, tiles: Tiles) -> Form:
        block_f = _block(self.features, tiles.features)
        return form_of(
            self.feature_map,
            self.q.shape[-1],
            self.v.shape[-1],
            self.features,
            self.columns,
            block_f,
            _block(self.v.shape[-1], tiles.columns),
            _block(self.q.shape[-1], 32) if self.feature_map == "taylor2" else block_f,
            tiles.tokens,
            "tf32x3" if self.q.dtype == torch.float32 else "tf32",
        )

    def options(self, tiles: Tiles) -> dict[str, Any]:
        form = self.form(tiles)
        return {"form": form, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _block(size: int, maximum: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), maximum)


def _states_of_chunks(
    call: Call,
    tiles: Tiles,
    inputs: Inputs,
    before: Tensor | None,
    after: Tensor | None,
    queries: bool,
) -> Tensor:
    """States [slots, H, F, C] entering each chunk; with queries, gradients of the states leaving
    each chunk, from a reverse scan."""
    slots, options = call.slots(tiles), call.options(tiles)
    sums = call.float32(slots, call.heads, call.features, call.columns)
    factors = None if call.log_decay is None else call.float32(slots, call.heads)
    form = options["form"]
    parts = triton.cdiv(call.features, form.BLOCK_F.value)
    parts *= triton.cdiv(call.v.shape[-1], form.BLOCK_V.value)
    programs = slots * call.heads * parts
    given = (inputs, sums, factors, *call.sizes(tiles), parts)
    launch(sums_kernel, programs, call.q, *given, QUERY=queries, **options)
    size = call.features * call.columns
    parts = triton.cdiv(size, ELEMENTS)
    launch(
        scan_kernel,
        call.sequences * call.heads * parts,
        call.q,
        sums,
        factors,
        states_of(before),
        states_of(after),
        call.cu_seqlens,
        call.tokens,
        call.per_sequence(tiles),
        call.heads,
        parts,
        REVERSE=queries,
        SIZE=size,
        BLOCK_T=tiles.tokens,
        BLOCK=ELEMENTS,
    )
    return sums


def per_channel(call: Call) -> bool:
    return call.log_decay is not None and call.log_decay.dim() == call.q.dim()


def without_correction(call: Call) -> DeltaCall:
    """A call with decays per channel, for the kernels of delta_attention, which keep the decays
    inside the products of pairs."""
    state = call.initial_state, call.return_final_state, call.cu_seqlens
    return DeltaCall(call.q, call.k, call.v, None, call.log_decay, call.scale, False, *state)


def linear_attention(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call.of(a)
    if per_channel(call):
        return *forward_of(without_correction(call)), call.float32(0)
    q, v, inputs = call.q, call.v, call.inputs()
    plain = call.feature_map != "taylor2"
    tiles = tuned("linear_attention", call.plan().forward, q, v.shape[-1], plain)
    out = call.new((*q.shape[:-1], v.shape[-1]))
    normalizer = call.new(call.statistics_shape, torch.float32) if call.normalize else None
    final_state = call.float32(*call.state_shape) if call.return_final_state else None
    states = _states_of_chunks(call, tiles, inputs, call.initial_state, final_state, queries=False)
    options = call.options(tiles)
    parts = triton.cdiv(v.shape[-1], options["form"].BLOCK_V.value)
    programs = call.slots(tiles) * call.heads * parts
    nan = call.new((programs,), torch.int32)
    given, sizes = (inputs, states, call.rows(out)), (*call.sizes(tiles), parts)
    launch(results_kernel, programs, q, *given, normalizer, nan, *sizes, **options)
    again = triton.cdiv(programs, TILES_AGAIN.value)
    options |= {"num_warps": 8, "maxnreg": MAX_REGISTERS}
    launch(results_again_kernel, again, q, *given, nan, programs, *sizes, **options)
    return (
        out,
        call.float32(0) if final_state is None else final_state,
        call.float32(0) if normalizer is None else normalizer,
    )


def linear_attention_backward(a: Any) -> tuple[Tensor, ...]:
    call = Call.of(a)
    if per_channel(call):
        needs = a.needs_dlog_decay, a.needs_dinitial_state
        found = backward_of(without_correction(call), a.dout, a.dfinal_state, *needs)
        return *found[:3], *found[4:]  # without dbeta
    q, k, v, dout, normalizer = a.q, a.k, a.v, a.dout, a.normalizer
    plan = call.plan()
    tiles = plan.backward
    slots = call.slots(tiles)
    if dout is None:
        dout = q.new_zeros(v.shape[-1]).expand(*q.shape[:-1], v.shape[-1])
    delta = None if normalizer is None else torch.empty_like(normalizer)
    inputs = call.inputs(call.rows(dout), normalizer, delta)
    if normalizer is not None:
        outs = (call.rows(a.out), delta, *call.lengths(tiles))
        launch(delta_kernel, slots * call.heads, q, inputs, *outs, form=call.form(tiles))
    # Compiled for the inputs of the forward.
    states = _states_of_chunks(call, tiles, call.inputs(), call.initial_state, None, queries=False)
    dinitial = None
    if a.needs_dinitial_state:
        dinitial = call.float32(*call.state_shape)
    gradients = _states_of_chunks(call, tiles, inputs, a.dfinal_state, dinitial, queries=True)
    dq, dk, dv = (call.new(t.shape) for t in (q, k, v))
    for kernel, tiles, heads, given, result, block in (
        (queries_kernel, plan.backward, call.heads, states, dq, "BLOCK_D"),
        (keys_kernel, plan.keys, call.kv_heads, gradients, dk, "BLOCK_D"),
        (values_kernel, plan.backward, call.kv_heads, gradients, dv, "BLOCK_V"),
    ):
        options = call.options(tiles)
        parts = triton.cdiv(result.shape[-1], getattr(options["form"], block).value)
        sizes = (*call.sizes(tiles), parts)
        programs = slots * heads * parts
        launch(kernel, programs, q, inputs, given, call.rows(result), *sizes, **options)
    ddecay = call.float32(0)
    if a.needs_dlog_decay:
        ddecay = _decay_gradient(call, plan.decay, inputs, states, gradients)
    return dq, dk, dv, ddecay, call.float32(0) if dinitial is None else dinitial


def _decay_gradient(
    call: Call, tiles: Tiles, inputs: Inputs, states: Tensor, gradients: Tensor
) -> Tensor:
    slots = call.slots(tiles)
    constant = call.log_decay.dim() == 1
    sums = call.float32(slots, call.heads) if constant else None
    shape = (call.sequences, call.heads) if constant else call.log_decay.shape
    ddecay = call.new(shape, torch.float32)
    given = (inputs, states, gradients, ddecay, sums, *call.sizes(tiles))
    launch(decay_kernel, slots * call.heads, call.q, *given, **call.options(tiles))
    if constant:
        launch(
            sum_chunks_kernel,
            call.sequences,
            call.q,
            sums,
            ddecay,
            call.cu_seqlens,
            call.tokens,
            call.per_sequence(tiles),
            call.heads,
            BLOCK_T=tiles.tokens,
            BLOCK_H=triton.next_power_of_2(max(call.heads, 1)),
        )
    return ddecay
