"""torch.nn.functional.scaled_dot_product_attention on :func:`tokenmill.attention`.

torch's function is a composite that ends in one operator per kernel. enable() replaces the flash
kernels, forward and backward, for the CPU and for CUDA; torch still decides which calls reach them:

- CPU: four dimensions, one head dimension, no dropout, a mask without a gradient.
- CUDA: float16 and bfloat16, no mask, no dropout, compute capability 8.0 and up.

Other calls use torch's own kernels, and so do nested tensors, varlen_attn, and the fused path of
torch.nn.TransformerEncoderLayer and MultiheadAttention in eval(), which calls no attention operator
(torch.backends.mha.set_fastpath_enabled(False) disables it). A call that reaches them but is not
supported by tokenmill is forwarded to torch's kernel, with one warning per reason.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from .._call.autograd import below_autograd
from .._call.choose import choose, namespace, reasons
from .._check import MAX_HEAD_DIM, InputError, fail, is_scale
from ..dense.attention import BACKWARD, FORWARD, OUT, SPEC, lower

__all__ = ["Route", "disable", "enable"]

NAME = "tokenmill"
OP = "integrations.sdpa.enable"
BACKENDS = ("cpu", "cuda", "triton", "emulated")


class Route:
    """The override set up by enable(), until remove() or the end of its with statement.

    Attributes:
        served: number of calls that ran on tokenmill, forward and backward.
        passed: number of calls forwarded to torch's kernel, by reason.
    """

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self.served = 0
        self.passed: Counter[str] = Counter()

    def remove(self) -> None:
        """Removes this route; a second call does nothing."""
        with _lock:
            if self in _routes:
                _routes.remove(self)
                if not _routes:
                    _restore()

    def __enter__(self) -> Route:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def refuses(self, reason: str) -> None:
        if reason not in self.passed:
            warnings.warn(f"tokenmill sdpa: {reason}; torch's kernel runs", stacklevel=4)
        self.passed[reason] += 1


_lock = threading.RLock()  # reentrant: torch's registry calls remove() of _Kernels
_routes: list[Route] = []  # the last one is active
_before: str | None = None  # flash attention implementation active before the first route


def enable(*, backend: str | None = None) -> Route:
    """Makes scaled_dot_product_attention run on tokenmill, in the whole process.

    Args:
        backend: "cpu", "cuda", "triton" or None, as in :func:`tokenmill.attention`.

    Returns:
        a :class:`Route`, which is also a context manager: leaving it restores the previous state.
        Routes nest.

    ``torch.nn.attention.activate_flash_attention_impl("tokenmill")`` is the same without a backend,
    once this module is imported. Graphs of torch.compile use the route that is enabled when they
    run.

    Raises:
        RuntimeError: for another backend, or a torch without torch.library.get_kernel.

    Example:
        >>> import torch
        >>> from tokenmill.integrations import sdpa
        >>> q = torch.randn(1, 2, 16, 8)
        >>> with sdpa.enable() as route:
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> route.served
        1
    """
    global _before
    if backend is not None and backend not in BACKENDS:
        fail(OP, "backend", "must be cpu, cuda, triton or None", backend)
    if not hasattr(torch.library, "get_kernel"):
        fail(OP, "torch", "must have torch.library.get_kernel (2.10)", torch.__version__)
    route = Route(backend)
    with _lock:
        if not _routes:
            _before = torch.nn.attention.current_flash_attention_impl() if REGISTRY else None
            if not REGISTRY:
                _install()
            elif _before != NAME:
                torch.nn.attention.activate_flash_attention_impl(NAME)
        _routes.append(route)
    return route


def disable() -> None:
    """Removes all routes."""
    for route in (*_routes,):
        route.remove()


def _restore() -> None:
    """Activates the implementation that was active before the first route."""
    if not REGISTRY:
        _kernels.remove()
    elif _before != NAME and torch.nn.attention.current_flash_attention_impl() == NAME:
        torch.nn.attention.restore_flash_attention_impl()
        if _before is not None:
            torch.nn.attention.activate_flash_attention_impl(_before)


Kernel = Callable[..., Any]
REGISTRY = hasattr(torch.nn.attention, "register_flash_attention_impl")


class _Kernels:
    """The torch library that holds our kernels, and the kernels that they override."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = None
        self.own: dict[str, Kernel] = {}

    def install(self) -> _Kernels:
        if self.library is not None:
            return self
        library = torch.library.Library("aten", "IMPL")
        for name, (key, kernel) in OVERRIDES.items():
            try:
                own = torch.library.get_kernel(f"aten::{name}", key).call_boxed
            except RuntimeError:  # a torch without CUDA
                continue
            self.own[name] = own
            with warnings.catch_warnings():  # overriding a kernel is intended
                warnings.simplefilter("ignore")
                library.impl(name, kernel, key, with_keyset=True)
        self.library = library
        return self

    def remove(self) -> None:
        """torch's registry also calls this when another implementation is activated."""
        with _lock:
            self.library = None
            _routes.clear()


def _install() -> _Kernels:
    return _kernels.install()


def _cpu_forward(
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    call = _Call(query, key, value, dropout_p, is_causal, attn_mask, scale)
    if not call.served():
        return _kernels.own[CPU](
            keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    out, lse = call.forward()
    lse = lse.masked_fill(lse == -torch.inf, 0)  # torch's value for a row with no visible key
    return out, lse.mT.contiguous().mT  # the strides declared by torch's meta function


def _cpu_backward(
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(query, key, value, dropout_p, is_causal, attn_mask, scale)
    if not call.served():
        return _kernels.own[CPU + "_backward"](
            keys, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal,
            attn_mask=attn_mask, scale=scale,
        )  # fmt: skip
    return call.backward(grad_out, out, logsumexp)


def _cuda_forward(
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    call = _Call(query, key, value, dropout_p, is_causal, None, scale)
    if not call.served(return_debug_mask):
        return _kernels.own[CUDA](
            keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
        )
    out, lse = call.forward()
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # no random number is drawn
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    lengths = query.shape[2], key.shape[2]
    return out, lse, None, None, *lengths, seed, offset, query.new_empty(0)


def _cuda_backward(
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(query, key, value, dropout_p, is_causal, None, scale)
    if not call.served():
        return _kernels.own[CUDA + "_backward"](
            keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
            dropout_p, is_causal, philox_seed, philox_offset, scale=scale,
        )  # fmt: skip
    return call.backward(grad_out, out, logsumexp)


CPU = "_scaled_dot_product_flash_attention_for_cpu"
CUDA = "_scaled_dot_product_flash_attention"
OVERRIDES: dict[str, tuple[str, Kernel]] = {
    CPU: ("CPU", _cpu_forward),
    CPU + "_backward": ("CPU", _cpu_backward),
    CUDA: ("CUDA", _cuda_forward),
    CUDA + "_backward": ("CUDA", _cuda_backward),
}
_kernels = _Kernels()


class _Call:
    """One call of scaled_dot_product_attention, forward or backward.

    query is [B, H, Sq, D], key [B, Hk, Sk, D], value [B, Hk, Sk, D]. torch's causal mask is aligned
    top-left: query i sees keys j <= i, whatever the lengths, so keys from Sq on are never visible.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool,
        mask: Tensor | None, scale: float | None,
    ) -> None:  # fmt: skip
        self.tensors = query, key, value
        self.dropout, self.causal, self.mask, self.scale = dropout, causal, mask, scale
        self.seen = min(query.shape[2], key.shape[2]) if causal else key.shape[2]
        self.route = (_routes[-1:] or [_default])[0]

    def served(self, debug_mask: bool = False) -> bool:
        """Whether tokenmill takes the call; otherwise the route records the reason."""
        reason = "a debug mask is not returned" if debug_mask else self._reason()
        if reason:
            self.route.refuses(reason)
            return False
        self.lowered = self._lower()
        asked = self.route.backend
        if asked and (why := reasons(SPEC, asked, self.lowered)):
            self.route.refuses(f"backend {asked}: {'; '.join(why)}")
            return False
        try:
            chosen = choose(SPEC, self.lowered, asked)
        except InputError as error:  # TOKENMILL_BACKEND
            self.route.refuses(str(error))
            return False
        if chosen == "reference":
            self.route.refuses("no kernel runs the call (tokenmill.explain says why)")
            return False
        self.namespace = namespace(chosen)
        return True

    def _reason(self) -> str | None:
        query, key, value = self.tensors
        if self.dropout > 0:
            return "no kernel drops weights (dropout_p > 0)"
        if self.causal and query.shape[2] > key.shape[2]:
            return "causal attention of more queries than keys"
        if query.dtype == torch.float64:
            return "float64 has no kernel"
        if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM or not query.shape[3]:
            return f"heads must have 1 to {MAX_HEAD_DIM} dimensions"
        if not key.shape[1] or query.shape[1] % key.shape[1]:
            return "the number of key heads must divide that of query heads"
        if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0]:
            return "tensors must agree in batch, key heads and keys"
        if self.scale is not None and not is_scale(self.scale):
            return "scale must be at most 2^127 in size"
        if self.mask is not None and self.mask.dtype not in (query.dtype, torch.float32):
            return "a mask must have the dtype of the query or float32"
        return None

    def _lower(self) -> tuple[Any, ...]:
        q, k, v = (_last_contiguous(x.detach().transpose(1, 2)) for x in self.tensors)
        k, v = k[:, : self.seen], v[:, : self.seen]
        mask = None
        if self.mask is not None:
            mask = _last_contiguous(self.mask.detach()[..., : self.seen])
        return lower(q, k, v, scale=self.scale, bias=mask, causal=self.causal)

    def forward(self) -> tuple[Tensor, Tensor]:
        """out, in the layout of the query, and lse [B, H, Sq]."""
        query = self.tensors[0]
        out = torch.empty_like(query)
        if self.namespace != namespace("cpu") or out.stride(-1) != 1:
            result, lse = below_autograd(FORWARD, self.namespace, self.lowered)
            out.copy_(result.transpose(1, 2))
        else:
            lse = below_autograd(OUT, self.namespace, (*self.lowered, out.transpose(1, 2)))
        self.route.served += 1
        return out, lse

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients, in the layout [B, S, H, D]."""
        grad, out = (_last_contiguous(x.detach().transpose(1, 2)) for x in (grad, out))
        needs = (False,) * 4  # needs of score_bias, bias, alibi_slopes, sink
        dq, dk, dv, *_ = below_autograd(
            BACKWARD, self.namespace, (grad, None, out, lse.contiguous(), *needs, *self.lowered)
        )
        self.route.served += 1
        if unseen := self.tensors[1].shape[2] - self.seen:
            dk, dv = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, unseen)) for x in (dk, dv))
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_default = Route(None)  # used by activate_flash_attention_impl, which creates no route

if REGISTRY:
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_install)
