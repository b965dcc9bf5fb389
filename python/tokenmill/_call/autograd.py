"""Autograd of operators.

Kernels have first derivatives in reverse mode. Any other derivative of a kernel (a forward-mode
tangent, the derivative of a gradient) raises an error that names the operator, and is never
silently 0; the reference supports all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .._check import fail
from .operator import TorchOp, registered
from .sharded import sharding_of

ELSEWHERE = "use backend='reference'"


def transformed() -> bool:
    """Whether torch.func or forward mode is active. Its wrappers and dual tensors are ordinary
    torch.Tensor objects that only the full dispatcher unwraps.
    """
    level: int = forward_ad._current_level
    return level >= 0 or torch._C._are_functorch_transforms_active()


_recorded: dict[tuple[str, str], Callable[..., Any] | None] = {}


def recorded(op: TorchOp, namespace: str) -> Callable[..., Any] | None:
    """Runs the operator below the dispatcher's autograd and records its derivative; None if it has
    none. It takes all arguments of a call, then the dispatch keys or None.
    """
    key = (op.name, namespace)
    if key not in _recorded:
        function: Any = autograd_function(op, namespace)
        _recorded[key] = function and function.apply
    return _recorded[key]


def autograd_function(op: TorchOp, namespace: str) -> type[_SingleLevelFunction] | None:
    """The autograd function that runs the operator below autograd and defines its derivative; None
    if it has none. It takes the arguments of the schema, then the dispatch keys or None. Each level
    of torch.func enters here separately: torch.autograd.Function would restart at the top level.
    """
    if op.differentiates:
        setup_context: Callable[..., Any] = _keep_nothing
        backward: Callable[..., Any] = _refuse_second(op)
    elif op.backward:
        assert op.setup_context
        setup_context, backward = op.setup_context, op.backward
    else:
        return None
    ops = {below: _Calls(namespace, below) for below in (True, False)}

    def run(ctx: Any, *args: Any) -> Any:
        *arguments, keys = args
        if torch._C._are_functorch_transforms_active():
            # The next level records on its own; apply has disabled recording.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                results = _below(op, namespace, keys, arguments)
        else:
            results = _below(op, namespace, keys, arguments)
        setup_context(ctx, op.record(*arguments), results)
        return results

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (*backward(ops[_plain()], ctx, *grads), None)

    members: dict[str, Callable[..., Any]] = {
        "forward": run,
        "backward": differentiate,
        "_compiled_autograd_key": torch.autograd.Function._compiled_autograd_key,
    }
    static = {name: staticmethod(member) for name, member in members.items()}
    return type(f"{op.name}_autograd", (_SingleLevelFunction,), static)


class _Calls:
    """The operators of torch.ops.<namespace> for a backward, with all arguments by position. Below
    autograd they skip the dispatcher's autograd, which costs 10 us per call.
    """

    def __init__(self, namespace: str, below: bool) -> None:
        self._namespace = namespace
        self._below = below

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = registered(name)

        def run(*values: Any) -> Any:
            if self._below:
                return below_autograd(op, self._namespace, values)
            return op.run(self._namespace, values)

        setattr(self, name, run)
        return run


def _plain() -> bool:
    """Whether nothing is recorded, transformed or traced."""
    if torch.compiler.is_compiling():
        return False
    modes: int = torch._C._len_torch_dispatch_stack()
    return not (torch.is_grad_enabled() or modes or transformed())


def below_autograd(op: TorchOp, namespace: str, values: Sequence[Any]) -> Any:
    """The results of a call that is not recorded."""
    results = op.run_direct(namespace, values)
    if results is not NotImplemented:
        return results
    sharding_of(values)
    with torch._C._AutoDispatchBelowAutograd():
        return op.run(namespace, values)


def _below(op: TorchOp, namespace: str, keys: Any, values: Sequence[Any]) -> Any:
    if keys is None:
        return below_autograd(op, namespace, values)
    with torch._C._AutoDispatchBelowAutograd():
        keys &= torch._C._after_autograd_keyset
        return op.call(op.overload(namespace).redispatch, values, keys)


def keep(ctx: Any, record: Any, *results: Tensor | None) -> None:
    """Saves, for the backward, the arguments of a call and the results that it needs."""
    values, places = list(record), record.places
    ctx.save_for_backward(*[values[i] for i in places], *results)
    for i in places:
        values[i] = None
    ctx.type, ctx.values = type(record), values
    ctx.set_materialize_grads(False)


def kept(ctx: Any) -> tuple[Any, list[Any]]:
    """The record of the arguments and the results saved by `keep`."""
    saved, values, places = ctx.saved_tensors, ctx.values.copy(), ctx.type.places
    for i, t in zip(places, saved, strict=False):
        values[i] = t
    return ctx.type(*values), list(saved[len(places) :])


def _keep_nothing(ctx: Any, record: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)


def _refuse_second(op: TorchOp) -> Callable[..., Any]:
    forward = op.differentiates
    assert forward

    def refuse(ops: Any, ctx: Any, *grads: Tensor | None) -> Any:
        needed = [name for name, n in op.needed_gradients(ctx).items() if n]
        name = next((name for name in needed if name in forward.arguments), needed[0])
        rule = f"must not be differentiated twice by a kernel, {ELSEWHERE}"
        fail(forward.name, name, rule, next(grad for grad in grads if grad is not None))

    return refuse


def autograd_kernel(op: TorchOp, namespace: str) -> Callable[..., Any]:
    """Registers the operator at the dispatcher's autograd keys, for every level of torch.func."""
    apply = recorded(op, namespace)

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = op.bind(args, kwargs)
        tangent = None
        if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
            tangent = _find_tangent(op, arguments)
        if tangent and (apply or op.written):
            _refuse_tangent(op, *tangent)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            refuse_gradient(op, arguments)
            if apply:
                if not torch._C._are_functorch_transforms_active():
                    return apply(*arguments, keys)
                with enable_single_level_autograd_function():
                    return apply(*arguments, keys)
        results = _below(op, namespace, keys, arguments)
        note_writes(op, arguments)
        if tangent and _has_floating(results):
            _refuse_tangent(op, *tangent)
        return results

    return kernel


def _find_tangent(op: TorchOp, arguments: Sequence[Any]) -> tuple[str, Tensor] | None:
    """The first tangent of an argument, and the name of this argument."""
    for name, t in zip(op.arguments, arguments, strict=True):
        if isinstance(t, Tensor) and t.is_floating_point():
            tangent = forward_ad.unpack_dual(t).tangent
            if tangent is not None:
                return name, tangent
    return None


def _refuse_tangent(op: TorchOp, name: str, tangent: Tensor) -> NoReturn:
    rule = f"must not have a tangent (forward mode) in a kernel, {ELSEWHERE}"
    fail(op.public_name, name, rule, tangent)


def _has_floating(results: Any) -> bool:
    """Whether there is a floating-point result; one of shape [0] is only a placeholder."""
    results = results if isinstance(results, tuple) else (results,)
    tensors = [r for r in results if isinstance(r, Tensor)]
    return any(r.is_floating_point() and r.shape != (0,) for r in tensors)


def refuse_gradient(op: TorchOp, arguments: Sequence[Any]) -> None:
    """Raises if an argument requires a gradient in a call that has none."""
    if not (op.written or op.refuses_gradients):
        return
    for name, value in zip(op.arguments, arguments, strict=True):
        if isinstance(value, Tensor) and value.requires_grad:
            why = f"as the call writes into {op.written[0]}" if op.written else "there is none"
            rule = f"must not require a gradient, {why}"
            fail(op.public_name, name, rule, value.requires_grad)


def note_writes(op: TorchOp, arguments: Sequence[Any]) -> None:
    """Notifies autograd that saved tensors were overwritten."""
    for name in op.written:
        t = arguments[op.arguments.index(name)]
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)
