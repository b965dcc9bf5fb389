"""What layers with a short convolution and a recurrence share: their calls and their state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_device_of, check_tensor, fail, reads_values
from ..linear import causal_conv1d, causal_conv1d_decode
from ._blocks import by_blocks
from .rules import check_input

STATE = "nn.RecurrentState"
MAX_HEAD_DIM, MAX_CONV_KERNEL = 256, 8


class RecurrentState:
    """The state of :class:`GatedDeltaNet`, :class:`KimiDeltaAttention` and :class:`Mamba2`, one
    slot per sequence; the layer's new_state makes it.

    Args:
        conv: ``[slots, channels, W - 1]`` in the dtype of the weights, the last inputs of the
            convolution, the newest last.
        recurrent: float32 ``[slots, H, D, Dv]``, key by value.

    Example:
        >>> import torch, tokenmill as tm
        >>> state = tm.nn.GatedDeltaNet(64, 2, head_dim=16).new_state(8)
        >>> state.conv.shape, state.recurrent.shape
        (torch.Size([8, 128, 3]), torch.Size([8, 4, 16, 16]))
        >>> state.reset(torch.tensor([3]))
    """

    def __init__(self, conv: Tensor, recurrent: Tensor) -> None:
        for name, t, rank in (("conv", conv, 3), ("recurrent", recurrent, 4)):
            check_tensor(STATE, name, t)
            check(t.dim() == rank, STATE, name, f"must have {rank} dimensions", t.dim())
        slots = conv.shape[0]
        held = recurrent.shape[0] == slots
        check(held, STATE, "recurrent", f"must have the {slots} slots of conv", recurrent.shape)
        wide = recurrent.dtype == torch.float32
        check(wide, STATE, "recurrent", "must be float32", recurrent.dtype)
        check_device_of(STATE, "recurrent", recurrent, "conv", conv)
        self.conv, self.recurrent = conv, recurrent

    def reset(self, slots: Tensor | None = None) -> None:
        """Clears slots. None: all."""
        for t in (self.conv, self.recurrent):
            if slots is None:
                t.zero_()
            else:
                t[slots.long()] = 0


class GatedRMSNorm(nn.Module):
    """RMSNorm times a gate, in float32; gate_first: the gate multiplies what is normalized."""

    def __init__(
        self, channels: int, eps: float, gate: Literal["silu", "sigmoid"], *,
        groups: int = 1, gate_first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, self.gate, self.groups, self.gate_first = eps, gate, groups, gate_first
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return by_blocks(self._normalize, x, gate)

    def _normalize(self, x: Tensor, gate: Tensor) -> Tensor:
        gate = F.silu(gate.float()) if self.gate == "silu" else gate.float().sigmoid()
        x = x.float() * gate if self.gate_first else x.float()
        grouped = x.unflatten(-1, (self.groups, -1))
        grouped = grouped * (grouped.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        y = grouped.flatten(-2) * self.weight.float()
        return y if self.gate_first else y * gate


class RecurrentMixer(nn.Module):
    """A projection, a short convolution with silu, a recurrence, and a gated norm.

    A layer has conv1d and out (its last projection), and the four methods below.
    """

    name: ClassVar[str]
    conv1d: nn.Conv1d
    backend: str | None

    def _weight(self) -> Tensor:
        """The weight of the first projection, [rows, C]."""
        raise NotImplementedError

    def _state_shape(self) -> tuple[int, int, int]:
        """H, D, Dv."""
        raise NotImplementedError

    def _project(self, x: Tensor) -> tuple[Tensor, Any]:
        """Inputs of the convolution, and the rest."""
        raise NotImplementedError

    def _recurrence(
        self, mixed: Tensor, rest: Any
    ) -> tuple[Callable[..., Any], Callable[..., Tensor], dict[str, Any]]:
        """The operator of prompts, the operator of decoding, and their arguments."""
        raise NotImplementedError

    def _output(self, out: Tensor, mixed: Tensor, rest: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        self._check_input(x, packed=cu_seqlens is not None)
        mixed, rest = self._project(x)
        mixed = causal_conv1d(
            mixed, *self._taps(), activation="silu", cu_seqlens=cu_seqlens, backend=self.backend
        )
        prompt, _, arguments = self._recurrence(mixed, rest)
        out = prompt(**arguments, cu_seqlens=cu_seqlens, backend=self.backend)
        return self._output(out, mixed, rest)

    def new_state(self, slots: int) -> RecurrentState:
        """An empty state for a number of sequences."""
        slots = as_int(self.name, "slots", slots, minimum=0)
        weight = self.conv1d.weight
        conv = weight.new_zeros(slots, weight.shape[0], weight.shape[-1] - 1, requires_grad=False)
        shape = (slots, *self._state_shape())
        return RecurrentState(conv, torch.zeros(shape, device=weight.device))

    def prefill(self, x: Tensor, state: RecurrentState, slots: Tensor | None = None) -> Tensor:
        """Processes the next tokens x ``[B, T, C]`` of the sequences in slots int32 ``[B]`` (None:
        slot b for sequence b), many at once; the state is updated in place. Needs no_grad, like
        decode.
        """
        self._check_state(x, state, slots, prefill=True)
        rows = slice(x.shape[0]) if slots is None else slots.long()
        mixed, rest = self._project(x)
        mixed, conv = causal_conv1d(
            mixed, *self._taps(), activation="silu", initial_state=state.conv[rows],
            return_final_state=True, backend=self.backend,
        )  # fmt: skip
        prompt, _, arguments = self._recurrence(mixed, rest)
        out, recurrent = prompt(
            **arguments, initial_state=state.recurrent[rows], return_final_state=True,
            backend=self.backend,
        )  # fmt: skip
        state.conv[rows], state.recurrent[rows] = conv.to(state.conv.dtype), recurrent
        return self._output(out, mixed, rest)

    def decode(
        self,
        x: Tensor,
        state: RecurrentState,
        slots: Tensor | None = None,
        accepted: Tensor | None = None,
    ) -> Tensor:
        """Like prefill, for few tokens, usually one; reads and writes each state once. A slot of -1
        skips its sequence, whose result is 0. accepted, int32 ``[B]``: the state keeps as many of
        the first tokens of each sequence, as in :func:`tokenmill.delta_attention_decode`.
        """
        self._check_state(x, state, slots)
        kept: dict[str, Any] = {
            "state_indices": slots, "accepted": accepted, "backend": self.backend,
        }  # fmt: skip
        mixed, rest = self._project(x)
        mixed = causal_conv1d_decode(mixed, state.conv, *self._taps(), activation="silu", **kept)
        _, step, arguments = self._recurrence(mixed, rest)
        out = step(**arguments, state=state.recurrent, **kept)
        y = self._output(out, mixed, rest)
        return y if slots is None else y.masked_fill((slots < 0)[:, None, None], 0)

    def _taps(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _check_input(self, x: Tensor, packed: bool = False) -> None:
        weight = self._weight()
        check_input(self.name, "x", x, weight)
        channels = weight.shape[-1]
        layout = f"[T, {channels}] with cu_seqlens" if packed else f"[B, T, {channels}]"
        shaped = x.dim() == (2 if packed else 3) and x.shape[-1] == channels
        check(shaped, self.name, "x", f"must have shape {layout}", x.shape)

    def _check_state(
        self, x: Tensor, state: RecurrentState, slots: Tensor | None, prefill: bool = False
    ) -> None:
        name, weight = self.name, self.conv1d.weight
        self._check_input(x)
        held = isinstance(state, RecurrentState)
        check(held, name, "state", "must be a RecurrentState", state)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        check(not trains, name, "state", "requires torch.no_grad()", "gradients")
        check_device_of(name, "state", state.conv, "the weights", weight)
        same = state.conv.dtype == weight.dtype
        check(same, name, "state", "must have the dtype of the weights", state.conv.dtype)
        wanted = [weight.shape[0], weight.shape[-1] - 1], [*self._state_shape()]
        for t, shape in zip((state.conv, state.recurrent), wanted, strict=True):
            if list(t.shape[1:]) != shape:
                fail(name, "state", f"must have a part of shape {['slots', *shape]}", t.shape)
        count = state.conv.shape[0]
        if slots is None:
            rule = f"must have a slot for each of {x.shape[0]} sequences"
            check(x.shape[0] <= count, name, "state", rule, count)
            return
        check_tensor(name, "slots", slots)
        check(slots.dtype == torch.int32, name, "slots", "must be int32", slots.dtype)
        named = slots.dim() == 1 and slots.shape[0] == x.shape[0]
        check(named, name, "slots", f"must have shape [{x.shape[0]}]", slots.shape)
        check_device_of(name, "slots", slots, "x", x)
        if not reads_values(slots):
            return
        found, minimum = slots.tolist(), 0 if prefill else -1
        for slot in found:
            rule = f"must be {minimum} to {count - 1}"
            check(minimum <= slot < count, name, "slots", rule, slot)
        used = [slot for slot in found if slot >= 0]
        check(len({*used}) == len(used), name, "slots", "must not repeat a slot", found)


def short_convolution(channels: int, kernel: int, bias: bool) -> nn.Conv1d:
    """Holds the taps ``[channels, 1, W]`` under the names of the published layers."""
    return nn.Conv1d(channels, channels, kernel, groups=channels, bias=bias)


def check_sizes(
    name: str, dim: int, conv_kernel: int, eps: float, **counts: tuple[int, int]
) -> tuple[int, int, float, list[int]]:
    """Checks channels, taps, epsilon, and counts with their maximum."""
    dim = as_int(name, "dim", dim)
    check(1 <= dim < 2**31, name, "dim", "must be 1 to 2^31 - 1", dim)
    kernel = as_int(name, "conv_kernel", conv_kernel, minimum=1, maximum=MAX_CONV_KERNEL)
    found = []
    for argument, (value, maximum) in counts.items():
        value = as_int(name, argument, value)
        limit = "2^16" if maximum == 2**16 else str(maximum)
        check(1 <= value <= maximum, name, argument, f"must be 1 to {limit}", value)
        found.append(value)
    return dim, kernel, as_number(name, "eps", eps), found


def inverse_softplus_steps(count: int) -> Tensor:
    """Biases whose softplus is spread from 0.001 to 0.1 with equal logarithmic density, as in
    Mamba-2.
    """
    low, high = math.log(1e-3), math.log(1e-1)
    step = (torch.rand(count) * (high - low) + low).exp()
    return step + (-torch.expm1(-step)).log()


def log_rates(count: int, minimum: float) -> Tensor:
    """Logarithms of decay rates from minimum to 16."""
    return torch.empty(count).uniform_(minimum, 16).log()
