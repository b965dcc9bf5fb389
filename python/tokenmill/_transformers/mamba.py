"""The scan of Mamba-2 in transformers' models on linear attention.

The state of a head is a sum of decayed outer products of B (the key) and dt x (the value), and C is
the query. transformers keeps it as [B, H, P, N], value by key; it is stored here as the transposed
view of [B, H, N, P], so that decoding updates it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear import linear_attention, linear_attention_decode
from ..nn.mamba2 import decays_and_values, shared_heads
from .packing import first_of, last_of, needs_gradient, offsets_of

NO_LIMIT = (0.0, float("inf"))


def chunk_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 256,
    D: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: Sequence[float] = NO_LIMIT,
    return_final_states: bool = False, cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None, *, backend: str | None = None, **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A prompt: hidden_states [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, G, N]; the result
    in float32, with D times the input.
    """
    offsets = offsets_of(cu_seq_lens_q, seq_idx)
    decay, v = decays_and_values(
        hidden_states, dt, A, dt_bias=dt_bias, softplus=dt_softplus, limit=dt_limit
    )  # fmt: skip
    heads = hidden_states.shape[2]
    tensors = shared_heads(C, heads), shared_heads(B, heads), v, decay
    q, k, v, decay = tensors if offsets is None else (t[0] for t in tensors)
    before = None if initial_states is None else initial_states.float().mT
    found, state = linear_attention(
        q, k, v, log_decay=decay, scale=1.0, initial_state=first_of(before, offsets),
        return_final_state=True, cu_seqlens=offsets, backend=backend,
    )  # fmt: skip
    out = (found if offsets is None else found[None]).float()
    if D is not None:
        out = out + D[:, None] * hidden_states.float()
    return (out, last_of(state, offsets).mT) if return_final_states else out


def state_update(
    state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False, *,
    backend: str | None = None, **others: Any,
) -> Tensor:  # fmt: skip
    """A decode step: state [B, H, P, N] is updated in place; hidden_states and dt [B, H, P], A [H,
    P, N], B and C [B, G, N], D and dt_bias [H, P], of which dt, A, D and dt_bias are repeated.
    """
    x, b, c = (t[:, None] for t in (hidden_states, B, C))
    bias = None if dt_bias is None else dt_bias[:, 0]
    rates = dt[:, None, :, 0], A[:, 0, 0]
    if (
        state.dtype != torch.float32
        or not state.mT.is_contiguous()
        or needs_gradient(state, hidden_states, dt, A, B, C)
    ):
        out, after = chunk_scan(
            x, rates[0], rates[1], b, c, dt_bias=bias, dt_softplus=dt_softplus,
            initial_states=state, return_final_states=True, backend=backend,
        )  # fmt: skip
        state.copy_(after)
    else:
        heads = hidden_states.shape[1]
        decay, v = decays_and_values(x, *rates, dt_bias=bias, softplus=dt_softplus)
        out = linear_attention_decode(
            shared_heads(c, heads), shared_heads(b, heads), v, state.mT, log_decay=decay,
            scale=1.0, backend=backend,
        ).float()  # fmt: skip
    if D is not None:
        out = out + D[:, :1] * x.float()
    return out[:, 0]


def scan_layer(
    module: Any, hidden_states: Tensor, B: Tensor, C: Tensor, dt: Tensor, cache: Any, *,
    backend: str | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The scan of a layer, [B, T, H P], and its state in the cache (transformers 5.25).

    A step from a cached state knows no limit of dt, as in the model's own scan.
    """
    x = hidden_states.unflatten(-1, (module.num_heads, module.head_dim))
    b, c = (t.unflatten(-1, (module.n_groups, module.ssm_state_size)) for t in (B, C))
    A, tokens, at = -module.A_log.float().exp(), x.shape[1], module.layer_idx
    state = None if cache is None else cache.get_recurrent_state(at, state_idx=0)
    records = cache is not None and cache.is_recording_past(at)
    if state is not None and tokens == 1 and not records:
        wide = (
            dt[:, 0, :, None], A[:, None, None], b[:, 0], c[:, 0], module.D[:, None],
            module.dt_bias[:, None],
        )  # fmt: skip
        out = state_update(state, x[:, 0], *wide, dt_softplus=True, backend=backend)
        cache.update_recurrent_state(state, at)
        return out.flatten(1)[:, None]
    kept = min(cache.get_recurrent_states_to_keep(at) or 0, tokens) if records else 0
    steps = tokens if records and state is not None and tokens == 1 else kept
    pieces = zip(*(t.split([tokens - steps, *[1] * steps], 1) for t in (x, dt, b, c)), strict=True)
    outs, states = [], []
    for i, (x_i, dt_i, b_i, c_i) in enumerate(pieces):
        out, state = chunk_scan(
            x_i, dt_i, A, b_i, c_i, D=module.D, dt_bias=module.dt_bias, dt_softplus=True,
            initial_states=state, dt_limit=NO_LIMIT if i else module.time_step_limit,
            return_final_states=True, backend=backend, **(kwargs if steps == 0 else {}),
        )  # fmt: skip
        outs.append(out)
        states.append(state)
    if cache is not None:
        cache.update_recurrent_state(states[1:] if kept else state, at)
    return torch.cat(outs, 1).flatten(2)


def no_fused_layer(*args: Any, **kwargs: Any) -> None:
    """In training the layers ask for one kernel of all their steps; None: they go step by step."""


# By the names that the modules of transformers give them.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mamba2_chunk_scan": chunk_scan,
    "mamba2_selective_state_update": state_update,
    "mamba2_scan_forward": scan_layer,
    "mamba2_split_conv1d_scan_combined": no_fused_layer,
}
