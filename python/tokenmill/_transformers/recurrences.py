"""The recurrent layers of transformers' models on tokenmill's operators.

The forward of such a layer calls functions of its module by name. A patched layer runs the code of
this forward with these names bound to the functions below, so that other models keep their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..linear import (
    causal_conv1d,
    causal_conv1d_decode,
    delta_attention,
    delta_attention_decode,
)
from ..nn._blocks import by_blocks
from . import mamba
from .packing import first_of, last_of, needs_gradient, offsets_of


def chunk_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, *,
    backend: str | None = None, **others: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A prompt: q, k [B, T, Hk, D], v [B, T, Hv, Dv], g [B, T, Hv] or [B, T, Hv, D]."""
    offsets = offsets_of(cu_seq_lens_q if cu_seqlens is None else cu_seqlens, seq_idx)
    tensors = query, key, value, beta, g.float()
    q, k, v, b, decay = tensors if offsets is None else (t[0] for t in tensors)
    before = None if initial_state is None else initial_state.float()
    out, state = delta_attention(
        q, k, v, b, log_decay=decay, initial_state=first_of(before, offsets),
        return_final_state=True, qk_l2norm=use_qk_l2norm_in_kernel, cu_seqlens=offsets,
        backend=backend,
    )  # fmt: skip
    after = last_of(state, offsets) if output_final_state else None
    return out if offsets is None else out[None], after


def recurrent_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, *, backend: str | None = None,
    in_place: bool = True, **others: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A decode step. The layer writes the state that it gets here into its cache: with in_place a
    state in float32 is updated in place, which makes that a copy onto itself.
    """
    if (
        not in_place
        or initial_state is None
        or initial_state.dtype != torch.float32
        or needs_gradient(query, key, value, g, beta, initial_state)
    ):
        return chunk_delta_rule(
            query, key, value, g, beta, initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, backend=backend, **others,
        )  # fmt: skip
    out = delta_attention_decode(
        query, key, value, beta, initial_state, log_decay=g.float(),
        qk_l2norm=use_qk_l2norm_in_kernel, backend=backend,
    )  # fmt: skip
    return out, initial_state if output_final_state else None


def _own(activation: str | None) -> Literal["silu"] | None:
    return "silu" if activation in ("silu", "swish") else None


def _activated(out: Tensor, activation: str | None) -> Tensor:
    if activation is None or _own(activation):
        return out
    from transformers.activations import ACT2FN

    activated: Tensor = ACT2FN[activation](out)
    return activated


def convolve(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None, *, backend: str | None = None, **others: Any,
) -> Tensor:  # fmt: skip
    """A prompt, [B, C, T]."""
    offsets = offsets_of(cu_seq_lens_q, seq_idx)
    x = hidden_states.transpose(1, 2).to(weight.dtype)
    out = causal_conv1d(
        x if offsets is None else x[0], weight, bias, activation=_own(activation),
        cu_seqlens=offsets, backend=backend,
    )  # fmt: skip
    out = _activated(out if offsets is None else out[None], activation)
    return out.transpose(1, 2).to(hidden_states.dtype)


def convolve_layer(
    conv1d: nn.Conv1d, hidden_states: Tensor, cache: Any, layer_idx: int,
    activation: str | None = None, state_idx: int = 0, cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None, *, backend: str | None = None, **others: Any,
) -> Tensor:  # fmt: skip
    """The convolution of a layer, [B, C, T], and its state in the cache (transformers 5.25)."""
    weight, tokens = conv1d.weight.squeeze(1), hidden_states.shape[-1]
    state = None if cache is None else cache.get_conv_state(layer_idx, state_idx=state_idx)
    if state is not None and tokens == 1 and not cache.is_recording_past(layer_idx):
        cache.increase_count(layer_idx, state_idx)
        return convolve_step(
            hidden_states, state, weight, conv1d.bias, activation, backend=backend
        )  # fmt: skip
    if cache is not None:  # [B, C, columns in front of the tokens + T]
        hidden_states = cache.update_conv_state(
            hidden_states, layer_idx, state_idx=state_idx, conv_kernel_size=weight.shape[-1]
        )
    offsets = offsets_of(cu_seq_lens_q, seq_idx)
    if offsets is not None:  # the columns in front belong to the first sequence
        before = hidden_states.shape[-1] - tokens
        offsets = torch.cat([offsets[:1], offsets[1:] + before])
    out = convolve(
        hidden_states, weight, conv1d.bias, activation, cu_seq_lens_q=offsets, backend=backend
    )  # fmt: skip
    return out[..., out.shape[-1] - tokens :]


def convolve_step(
    hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """New tokens [B, C, T] against the inputs before them, [B, C, K], which are updated."""
    x = hidden_states.transpose(1, 2).to(weight.dtype)
    own = _own(activation)
    if conv_state.dtype == x.dtype and not needs_gradient(x, conv_state, weight, bias):
        out = causal_conv1d_decode(x, conv_state, weight, bias, activation=own, backend=backend)
    else:
        before = conv_state[..., conv_state.shape[-1] - weight.shape[-1] + 1 :].to(x.dtype)
        out = causal_conv1d(x, weight, bias, activation=own, initial_state=before, backend=backend)
        columns = torch.cat([conv_state, hidden_states.to(conv_state.dtype)], -1)
        conv_state.copy_(columns[..., -conv_state.shape[-1] :])
    return _activated(out, activation).transpose(1, 2).to(hidden_states.dtype)


# By the names that the modules of transformers give them.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": chunk_delta_rule,
    "torch_recurrent_gated_delta_rule": recurrent_delta_rule,
    "chunk_kimi_delta_attention": chunk_delta_rule,
    "recurrent_kimi_delta_attention": recurrent_delta_rule,
    "causal_conv1d_fn": convolve,
    "causal_conv1d_update": convolve_step,
    "causal_conv1d_forward": convolve_layer,
    **mamba.FUNCTIONS,
}
STEPS = {name for name, function in FUNCTIONS.items() if function is recurrent_delta_rule}
RULES = {name for name in FUNCTIONS if "delta" in name or "mamba2" in name}


def own_forward(layer: nn.Module) -> FunctionType | None:
    """The forward of a layer of transformers that calls a recurrence by name. None: another one."""
    if not type(layer).__module__.startswith("transformers.models."):
        return None
    forward = inspect.unwrap(type(layer).forward)
    if not isinstance(forward, FunctionType) or RULES.isdisjoint(forward.__code__.co_names):
        return None
    return forward


def _rebound(forward: FunctionType, backend: str | None, in_place: bool) -> FunctionType:
    """A forward with the functions above. in_place: whether decode steps update cached states."""
    given = {
        name: functools.partial(function, backend=backend)
        for name, function in FUNCTIONS.items()
        if name in forward.__globals__
    }
    for name in STEPS & given.keys():
        given[name] = functools.partial(given[name], in_place=in_place)
    names = {**forward.__globals__, **given}
    own = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def gated_norms(layer: nn.Module) -> list[nn.Module]:
    """The norms with a gate within a layer that run the forward of their class, row by row."""
    return [
        m for m in layer.modules()
        if type(m).__name__.endswith("RMSNormGated") and "forward" not in vars(m)
    ]  # fmt: skip


def normalize_by_blocks(norm: nn.Module) -> None:
    """Gives a gated norm the forward of its class on blocks of rows; it has eight temporaries."""
    forward = type(norm).forward

    def run(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        own = functools.partial(forward, self)
        return own(hidden_states) if gate is None else by_blocks(own, hidden_states, gate)

    norm.forward = MethodType(functools.wraps(forward)(run), norm)


def replace_functions(layer: nn.Module, backend: str | None) -> None:
    """Gives a layer its class's forward with the functions above.

    The wrappers around the forward of the class are left out: they rename an argument of old
    releases, and run hooks of accelerate on weights that the layer reads without calling their
    module. A cache that records its states, so that assisted decoding can take tokens back, keeps
    the state that a step begins with: these steps update a copy.
    """
    forward = own_forward(layer)
    assert forward is not None
    usual, recording = (_rebound(forward, backend, in_place) for in_place in (True, False))

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", args[1] if len(args) > 1 else None)
        records = cache is not None and cache.is_recording_past(self.layer_idx)
        return (recording if records else usual)(self, *args, **kwargs)

    layer.forward = MethodType(functools.wraps(forward)(run), layer)
