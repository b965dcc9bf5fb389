"""Linear layers of a model on oneDNN's matrix products where they are faster than torch's own.

On a CPU torch multiplies float32 matrices by MKL, which reaches half of the peak of AMD's newer
cores, and reads bfloat16 weights of a step slower than memory allows. The oneDNN of the same torch
does neither.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._call.autograd import transformed
from .._check import check, check_bool, check_choice

__all__ = ["Linears", "enable"]

NAME = "integrations.linear.enable"
ROUNDS = 5  # of a measurement, after the first call of each
Key = tuple[torch.dtype, int, int, int, bool, int]


class Linears:
    """The layers that :func:`enable` changed, until remove() or the end of its with statement.

    Attributes:
        layers: names of the layers.
        choices: True where oneDNN runs, by (dtype, rows, out_features, in_features, packed,
            threads), where rows is the next power of two.
    """

    def __init__(self, layers: dict[str, nn.Linear], use: str, pack: bool) -> None:
        self.layers = [*layers]
        self.choices: dict[Key, bool] = {}
        self._always, self._pack = use == "onednn", pack
        self._packed: dict[nn.Module, tuple[int, int, Tensor]] = {}
        self._changed = [*layers.values()]
        for layer in self._changed:
            layer.forward = functools.partial(self._forward, layer)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Restores the layers; a second call does nothing."""
        for layer in self._changed:
            del layer.forward
        self._changed, self._packed = [], {}

    def __enter__(self) -> Linears:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.remove()

    def _forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        if not _able(x, weight):
            return F.linear(x, weight, bias)
        recorded = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, weight, bias)
        )
        packed = self._pack and weight.dtype == torch.bfloat16 and not recorded
        stored = self._pack_of(layer, x) if packed else weight
        if not self._always and not self._faster(x, weight, stored, bias):
            return F.linear(x, weight, bias)
        if recorded:
            found: Tensor = _Product.apply(x, weight, bias)
            return found
        return _product(x, stored, bias)

    def _faster(self, x: Tensor, weight: Tensor, stored: Tensor, bias: Tensor | None) -> bool:
        """Whether oneDNN's product takes less time, measured at the first call of a shape."""
        width = x.shape[-1]
        rows = 1 << (x.numel() // width - 1).bit_length()
        packed = stored is not weight
        key = (x.dtype, rows, len(weight), width, packed, torch.get_num_threads())
        if key not in self.choices:
            with torch.no_grad():
                own, other = _times(
                    lambda: F.linear(x, weight, bias), lambda: _product(x, stored, bias)
                )
            self.choices[key] = other < own
        return self.choices[key]

    def _pack_of(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The weight in oneDNN's layout, made anew where it has changed."""
        weight = layer.weight
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        known = self._packed.get(layer)
        if known is None or known[:2] != state:
            rows = x.numel() // x.shape[-1]
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            known = self._packed[layer] = (*state, packed)
        return known[2]


def _able(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product takes these tensors as they are, and nothing else watches."""
    return (
        type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _has_bfloat16()))
        and x.numel() > 0
        and weight.numel() > 0
        and x.is_contiguous()
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not transformed()
    )


@functools.cache
def _has_bfloat16() -> bool:
    found: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return found


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _times(*calls: Callable[[], Tensor]) -> list[float]:
    """Minimum seconds of each call, taken in turn."""
    for call in calls:
        call()
    least = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


class _Product(torch.autograd.Function):
    """oneDNN's product with the gradients of torch's linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            (rows @ weight).view(x.shape) if of_x else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def enable(model: nn.Module, use: str = "faster", pack: bool = False) -> Linears:
    """Computes the linear layers of a model by oneDNN's matrix products on CPUs.

    Layers are those of class torch.nn.Linear. Calls in float32 and bfloat16 change, others, and
    those under autocast, torch.compile (which has oneDNN's products of its own) and torch.func, run
    as before. Both products sum in float32, in another order: float32 results differ by rounding,
    and with use="faster", which depends on measured times, two processes may differ. Gradients are
    computed by torch's own products.

    Args:
        model: any module.
        use: "faster": for each shape whatever took less time at its first call (rows: to the next
            power of two); "onednn": always oneDNN, which does not depend on times.
        pack: keep a copy of each bfloat16 weight in oneDNN's layout, for calls that need no
            gradient. It doubles the memory of weights, and steps of one token, bound by reading
            weights, take half of the time. A weight that changes is packed anew.

    Returns:
        The changed layers: `with enable(model):` or `remove()` restores them.

    Raises:
        RuntimeError: naming argument, rule and value.

    Example:
        >>> import torch
        >>> from tokenmill.integrations import linear
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
        >>> with linear.enable(model, use="onednn") as linears:
        ...     out = model(torch.randn(8, 64))
        >>> linears.layers
        ['0', '1']
    """
    check_choice(NAME, "use", use, "faster", "onednn")
    check_bool(NAME, "pack", pack)
    rule = "must be a torch.nn.Module"
    check(isinstance(model, nn.Module), NAME, "model", rule, type(model).__name__)
    rule = "must be 'faster' on a torch without oneDNN"
    there = torch.backends.mkldnn.is_available()
    check(there or use == "faster", NAME, "use", rule, use)
    found = {n: m for n, m in model.named_modules() if type(m) is nn.Linear} if there else {}
    rule = "must have no linear layer with a forward of its own (another enable(), or a hook)"
    owned = next((name for name, layer in found.items() if "forward" in vars(layer)), None)
    check(owned is None, NAME, "model", rule, owned)
    return Linears(found, use, pack)
