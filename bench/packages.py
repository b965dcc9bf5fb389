"""Peers from other packages, by name: installed versions, and the calls that they support.

A peer whose result differs from ours is left out of a row, so that all peers are timed at the same
task. Tensors are [B, S, H, D].
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import case, engines
from .case import Absent, Run

Forward = Callable[..., Tensor]
TOLERANCE = 0.02  # relative to the maximum element, for 16-bit results


@dataclass(frozen=True)
class Peer:
    """calls: by operator, a factory that turns the options of a case into a function of the
    tensors. engine: by operator, a factory that turns tensors and options into a call without
    arguments, and without gradients (engines.py)."""

    name: str
    module: str
    package: str  # distribution name in pip
    calls: Mapping[str, Callable[..., Forward]] = field(default_factory=dict)
    engine: Mapping[str, Callable[..., engines.Call]] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.engine else "cuda"


def _sixteen_bits(name: str, tensors: tuple[Tensor, ...]) -> None:
    if tensors[0].dtype not in (torch.float16, torch.bfloat16):
        raise Absent(f"{name}: only float16 and bfloat16")


def _flash_attention(*, causal: bool, left: int) -> Forward:
    from flash_attn import flash_attn_func

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _sixteen_bits("flash-attn", (q,))
        return flash_attn_func(q, k, v, causal=causal, window_size=(left, 0 if left >= 0 else -1))

    return forward


def _flash_attention_3(*, causal: bool, left: int) -> Forward:
    from flash_attn_interface import flash_attn_func

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _sixteen_bits("flash-attn 3", (q,))
        found = flash_attn_func(q, k, v, causal=causal, window_size=(left, 0 if left >= 0 else -1))
        return found[0] if isinstance(found, tuple) else found  # older versions return lse, too

    return forward


def _flash_decode(*, seqlens_k: Tensor) -> Forward:
    from flash_attn import flash_attn_with_kvcache

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _sixteen_bits("flash-attn", (q,))
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens_k, causal=True)

    return forward


def _flashinfer_prefill(*, causal: bool, left: int) -> Forward:
    import flashinfer

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(q) != 1 or q.requires_grad:
            raise Absent("flashinfer: one sequence, only forward")
        call = flashinfer.single_prefill_with_kv_cache
        return call(q[0], k[0], v[0], causal=causal, window_left=left)[None]

    return forward


def _flashinfer_decode(*, seqlens_k: Tensor) -> Forward:
    import flashinfer

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[:2] != (1, 1):
            raise Absent("flashinfer: one query of one sequence")
        return flashinfer.single_decode_with_kv_cache(q[0, 0], k[0], v[0])[None, None]

    return forward


def _xformers(*, causal: bool, left: int) -> Forward:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    bias: Any = attn_bias.LowerTriangularMask() if causal else None
    if left >= 0:
        bias = attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(left + 1)
    return lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias)


def _simple_gla(*, slopes: Tensor) -> Forward:
    from fla.ops.simple_gla import chunk_simple_gla

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decay = (-slopes).expand(*q.shape[:3]).contiguous()
        return chunk_simple_gla(q, k, v, g=decay, scale=q.shape[-1] ** -0.5)[0]

    return forward


def _sdpa(backend: str) -> Callable[..., Forward]:
    """scaled_dot_product_attention restricted to one of its backends."""

    def make(*, causal: bool, left: int) -> Forward:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if left >= 0:
            raise Absent("SDPA: no window without a matrix")
        chosen = getattr(SDPBackend, backend, None)
        if chosen is None:
            raise Absent(f"SDPA of torch {torch.__version__} has no such backend")

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

        return forward

    return make


def compiled_flex(length: int, visible: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """flex_attention on [B, H, S, D], with a precomputed mask."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise Absent(f"flex_attention: {error}") from None
    mask = create_block_mask(visible, None, None, length, length, device=case.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask)


@functools.cache
def windowed_flex(length: int, left: int) -> Callable[..., Tensor]:
    """Causal flex_attention; left < 0: no window."""
    if left < 0:
        return compiled_flex(length, lambda b, h, i, j: j <= i)
    return compiled_flex(length, lambda b, h, i, j: (j <= i) & (i - j <= left))


def _flex(*, causal: bool, left: int) -> Forward:
    if not causal:
        raise Absent("flex_attention: its masks are the point; here is none")

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = (t.transpose(1, 2) for t in (q, k, v))
        return windowed_flex(q.shape[1], left)(*own).transpose(1, 2)

    return forward


PEERS = (
    Peer("flash-attn", "flash_attn", "flash-attn",
         {"attention": _flash_attention, "attention_decode": _flash_decode}),
    Peer("flash-attn 3", "flash_attn_interface", "flash-attn-3", {"attention": _flash_attention_3}),
    Peer("flashinfer", "flashinfer", "flashinfer-python",
         {"attention": _flashinfer_prefill, "attention_decode": _flashinfer_decode}),
    Peer("xformers", "xformers", "xformers", {"attention": _xformers}),
    Peer("fla", "fla", "flash-linear-attention", {"linear_attention": _simple_gla}),
    Peer("flex", "torch.nn.attention.flex_attention", "torch", {"attention": _flex}),
    Peer("sdpa flash", "torch", "torch", {"attention": _sdpa("FLASH_ATTENTION")}),
    Peer("sdpa efficient", "torch", "torch", {"attention": _sdpa("EFFICIENT_ATTENTION")}),
    Peer("sdpa cudnn", "torch", "torch", {"attention": _sdpa("CUDNN_ATTENTION")}),
    Peer("onnxruntime", "onnxruntime", "onnxruntime", engine={
        "attention": engines.onnx_attention, "attention_decode": engines.onnx_decode,
        "topk_select": engines.onnx_topk}),
    Peer("onnxruntime MHA", "onnxruntime", "onnxruntime",
         engine={"attention": engines.onnx_multi_head_attention}),
    Peer("OpenVINO", "openvino", "openvino", engine={
        "attention": engines.openvino_attention, "attention_decode": engines.openvino_decode}),
    Peer("JAX", "jax", "jax", engine={
        "attention": engines.jax_attention, "attention_decode": engines.jax_decode}),
    Peer("ZenTorch", "zentorch", "zentorch", engine={
        "attention": engines.zentorch_attention, "attention_decode": engines.zentorch_decode}),
    Peer("SDPA, folded", "torch", "torch", engine={"attention_decode": engines.folded_sdpa}),
    Peer("argpartition", "numpy", "numpy", engine={"topk_select": engines.numpy_topk}),
)  # fmt: skip


def status(device: str) -> dict[str, str]:
    """Version of each peer of the device by name, or the reason why it is absent."""
    return {peer.name: _status(peer) for peer in PEERS if peer.device == device}


def _status(peer: Peer) -> str:
    if not _installed(peer):
        return f"absent (not installed: pip install {peer.package})"
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _installed(peer: Peer) -> bool:
    try:
        return importlib.util.find_spec(peer.module) is not None
    except ImportError:  # import error inside the peer's package
        return False


def builders(
    op: str,
    tensors: list[Tensor],
    expected: Callable[[], Tensor],
    wrap: Callable[[Forward, list[Tensor]], Run],
    *,
    backward: bool = False,
    **options: Any,
) -> dict[str, Callable[[], Run]]:
    """Builders of the peers' calls of an operator, for the prepared case. expected: our result.
    wrap makes a run of a forward and its tensors. backward: the runs compute gradients, too."""

    def build(peer: Peer) -> Run:
        if not _installed(peer):
            raise Absent("not installed")
        if peer.engine:
            if backward:
                raise Absent("only forward")
            call = peer.engine[op](*tensors, **options)
            agree(call(), expected())
            return call
        forward = peer.calls[op](**options)
        agree(forward(*tensors), expected())
        run = wrap(forward, tensors)
        run()  # compiles the backward too
        return run

    able = [p for p in PEERS if p.device == case.device.type and op in {**p.calls, **p.engine}]
    return {peer.name: functools.partial(build, peer) for peer in able}


def agree(theirs: Tensor, ours: Tensor) -> None:
    """Raises Absent if the results are not of the same task."""
    if theirs.shape != ours.shape:
        raise Absent(f"another result: shape {[*theirs.shape]}, ours {[*ours.shape]}")
    if not ours.is_floating_point():
        if not torch.equal(theirs, ours):
            raise Absent("another result")
        return
    difference = float((theirs.float() - ours.float()).abs().max())
    limit = TOLERANCE * max(float(ours.float().abs().max()), 1e-3)
    if not difference <= limit:
        raise Absent(f"another result: {difference:.2g} away, {limit:.2g} allowed")
