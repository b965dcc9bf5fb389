"""Token merging and agent attention in the self-attention of diffusers' image models.

Example:
    >>> import torch
    >>> from diffusers import UNet2DConditionModel
    >>> from tokenmill.integrations.diffusers import patch, unpatch
    >>> unet = UNet2DConditionModel(
    ...     block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
    ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8)
    >>> patch(unet, ratio=0.5)
    >>> with torch.no_grad():
    ...     unet(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 7, 16)).sample.shape
    torch.Size([1, 4, 16, 16])
    >>> unpatch(unet)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._check import as_int, as_number, check, fail, needs

try:
    from diffusers.models.attention import BasicTransformerBlock
except ModuleNotFoundError as missing:
    raise needs("diffusers", missing) from missing

from ..dense.attention import attention
from ..tokens.bipartite_match import bipartite_match
from ..tokens.merge_tokens import merge_tokens, unmerge_tokens
from ._reduction import check_own_forward

__all__ = ["patch", "unpatch"]

NAME = "integrations.diffusers.patch"
KEEP = "_tokenmill_merging"


@dataclass(eq=False)
class _Merging:
    """Merging state of one model."""

    ratio: float
    cell: tuple[int, int]
    max_downsample: int
    generator: torch.Generator | None
    backend: str | None
    attentions: list[Any]
    agent_ratio: float | None = None
    agent_scale: float = 0.3
    shortcut: float = 0.075
    hook: Any = None
    sample: tuple[int, int] = (0, 0)  # rows and columns of the latest input
    finest: int = 0  # number of tokens in the first self-attention of the latest call

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if isinstance(given, Tensor) and given.dim() >= 4:
            self.sample = given.shape[-2], given.shape[-1]
        self.finest = 0

    def grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of a layer's tokens: the input size, halved repeatedly."""
        rows, columns = self.sample
        while rows * columns > tokens:
            rows, columns = -(-rows // 2), -(-columns // 2)
        rule = f"must be those of an input {list(self.sample)} halved some times"
        check(rows * columns == tokens, NAME, "tokens", rule, tokens)
        return rows, columns

    def attend(self, plain: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        x = hidden_states
        others = (*args, options.get("encoder_hidden_states"), options.get("attention_mask"))
        alone = x.dim() == 3 and all(other is None for other in others)
        if not alone:  # cross-attention, or a mask over the unmerged tokens
            return plain(x, *args, **options)
        tokens = x.shape[1]
        self.finest = max(self.finest, tokens)
        if tokens * self.max_downsample**2 < self.finest:
            return plain(x, *args, **options)
        state = None if self.generator is None else self.generator.get_state()
        assign, rows = self.match(x, self.ratio)
        merged, _ = merge_tokens(x, assign, rows, backend=self.backend)
        if self.agent_ratio is None:
            return unmerge_tokens(plain(merged, **options), assign, backend=self.backend)
        if state is not None and self.generator is not None:
            self.generator.set_state(state)  # agents use the same cells
        assign_agents, number = self.match(x, self.agent_ratio)
        if 2 * number < rows:
            agents, _ = merge_tokens(x, assign_agents, number, backend=self.backend)
            out = self.ask_agents(plain.__self__, merged, agents)
        else:
            out = plain(merged, **options)
        return unmerge_tokens(out, assign, backend=self.backend)

    def match(self, x: Tensor, ratio: float) -> tuple[Tensor, int]:
        assign, rows, _ = bipartite_match(
            x.detach(), int(ratio * x.shape[1]), partition="grid", grid=self.grid(x.shape[1]),
            cell=self.cell, generator=self.generator, backend=self.backend,
        )  # fmt: skip
        return assign, rows

    def ask_agents(self, attn: Any, x: Tensor, agents: Tensor) -> Tensor:
        """x [B, N, C]: agents [B, n, C] attend to the keys, and queries attend to the agents."""
        layers = (attn.to_q, attn.to_k, attn.to_v, attn.to_q)
        q, k, v, a = (
            layer(t).unflatten(2, (attn.heads, -1))
            for layer, t in zip(layers, (x, x, x, agents), strict=True)
        )
        gathered = attention(a, k, v, scale=attn.scale, backend=self.backend)
        second = attn.scale**self.agent_scale
        out = attention(q, a, gathered, scale=second, backend=self.backend)
        y = (out + self.shortcut * v).flatten(2)
        for layer in attn.to_out:
            y = layer(y)
        return y


def patch(
    pipe_or_model: Any, ratio: float = 0.5, *, cell: tuple[int, int] = (2, 2),
    max_downsample: int = 1, generator: torch.Generator | None = None,
    agent_ratio: float | None = None, agent_scale: float = 0.3, shortcut: float = 0.075,
    backend: str | None = None,
) -> None:  # fmt: skip
    r"""Merges similar tokens before each self-attention of an image model, and copies each row of
    its result to the tokens merged into it. With agent_ratio, a few agents A, made by merging more
    tokens, attend to the merged tokens (K, V), and the queries Q attend to the agents:

    .. math::
       y = \operatorname{softmax}(d^{-s/2}\, Q A^\top)\,
           \operatorname{softmax}(d^{-1/2}\, A K^\top)\, V + t V,

    with d channels per head, s agent_scale and t shortcut. Both are training-free.

    Args:
        pipe_or_model: a pipeline with a unet or a transformer, or such a model, with layers of the
            class BasicTransformerBlock (UNets of Stable Diffusion, DiT, PixArt).
        ratio: fraction of the tokens to merge, 0 to 1; at most all but one per cell.
        cell: rows and columns of a cell; others are merged into one token per cell.
        max_downsample: layers whose token grid is smaller than the model's finest by more than this
            factor per side are unchanged.
        generator: random choice of the token of a cell; None: the first.
        agent_ratio: fraction of the tokens that are merged to make the agents, 0 to 1. None, or if
            there are at least half as many agents as merged tokens: the model's own attention.
            Agents use the projections of a layer, and its processor does not run.
        agent_scale: exponent s of the factor of the second product.
        shortcut: t.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: N^2 C / 2 operations to match N tokens with a quarter of them, in exchange for the
    fraction of N^2 C saved in attention.

    Paper: ToMe for Stable Diffusion (Bolya and Hoffman 2023), section 4. Tokens are compared after
    the norm of the block. Agent Attention (Han et al. 2024), applied to Stable Diffusion: the
    released code uses agents in the first 20 of 50 steps, ratio=0.4, cell=(4, 4) and
    agent_ratio=0.95, and then only merges, ratio=0.4 and cell=(2, 2).
    """
    model = _model(NAME, pipe_or_model)
    ratio = as_number(NAME, "ratio", ratio)
    check(0 <= ratio <= 1, NAME, "ratio", "must be 0 to 1", ratio)
    agents: dict[str, Any] = {
        "agent_scale": as_number(NAME, "agent_scale", agent_scale),
        "shortcut": as_number(NAME, "shortcut", shortcut),
    }
    if agent_ratio is not None:
        agents["agent_ratio"] = as_number(NAME, "agent_ratio", agent_ratio)
        fits = 0 <= agents["agent_ratio"] <= 1
        check(fits, NAME, "agent_ratio", "must be 0 to 1, or None", agent_ratio)
    rule = "must be (rows, columns), at least 1"
    check(isinstance(cell, tuple | list) and len(cell) == 2, NAME, "cell", rule, cell)
    sizes = tuple(as_int(NAME, "cell", n, rule) for n in cell)
    check(min(sizes) >= 1, NAME, "cell", rule, cell)
    max_downsample = as_int(NAME, "max_downsample", max_downsample, minimum=1)
    check(KEEP not in vars(model), NAME, "model", "must not be patched yet", type(model).__name__)
    blocks = [m for m in model.modules() if type(m) is BasicTransformerBlock]
    attentions: list[Any] = [b.attn1 for b in blocks if not b.only_cross_attention]
    rule = "must have self-attention in blocks BasicTransformerBlock"
    check(len(attentions) > 0, NAME, "model", rule, type(model).__name__)
    check_own_forward(NAME, attentions)
    if agent_ratio is not None:
        normed = any(getattr(a, "norm_q", None) is not None for a in attentions)
        rule = "must be None where queries and keys have a norm"
        check(not normed, NAME, "agent_ratio", rule, agent_ratio)
    merging = _Merging(
        ratio, (sizes[0], sizes[1]), max_downsample, generator, backend, attentions, **agents
    )
    for attn in attentions:
        # Not a closure, so that a deep copy of the model refers to its own layers.
        attn.forward = functools.partial(merging.attend, attn.forward)
    merging.hook = model.register_forward_pre_hook(merging.see, with_kwargs=True)
    vars(model)[KEEP] = merging


def unpatch(pipe_or_model: Any) -> None:
    """Restores the layers' own attention."""
    name = "integrations.diffusers.unpatch"
    model = _model(name, pipe_or_model)
    merging = vars(model).pop(KEEP, None)
    check(merging is not None, name, "model", "must be patched", type(model).__name__)
    merging.hook.remove()
    for attn in merging.attentions:
        del attn.forward


def _model(name: str, given: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    for part in ("unet", "transformer"):
        if isinstance(model := getattr(given, part, None), nn.Module):
            return model
    fail(
        name,
        "pipe_or_model",
        "must be a model, or have a unet or transformer",
        type(given).__name__,
    )
