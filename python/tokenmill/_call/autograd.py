"""Autograd of operators.

Kernels have first derivatives in reverse mode. Any other derivative of a kernel (a forward-mode
tangent, the derivative of a gradient) raises an error that names the operator, and is never
silently 0; the reference supports all.
"""

from __future__ import annotations

import collections
import functools
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

Gradients = dict[str, Tensor | None]  # by the names of arguments
ELSEWHERE = "use backend='reference'"


def transformed() -> bool:
    """Whether torch.func or forward mode is active. Its wrappers and dual tensors are ordinary
    torch.Tensor objects that only the full dispatcher unwraps.
    """
    level: int = forward_ad._current_level
    return level >= 0 or torch._C._are_functorch_transforms_active()


# By namespace and name of an operator, what autograd_function returns, once it was called.
recorders: dict[str, dict[str, Callable[..., Any] | None]] = collections.defaultdict(dict)


def record(
    op: TorchOp, namespace: str, given: dict[str, Any], run: Callable[..., Any] | None = None
) -> Any:
    """Runs the operator below the dispatcher's autograd and records its derivative; NotImplemented
    if it has none. given: arguments by name; others have defaults. run takes all.
    """
    known = recorders[namespace]
    if op.name not in known:
        known[op.name] = autograd_function(op, namespace)
    recorder = known[op.name]
    if recorder is None:
        return NotImplemented
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in given.items() if name not in tensors}
    run = run or (lambda *values: below_autograd(op, namespace, values))
    return recorder(run, len(op.results), tuple(tensors), options, *tensors.values())


def autograd_function(op: TorchOp, namespace: str) -> Callable[..., Any] | None:
    """The autograd function that runs the operator below autograd and records its derivative; None
    if it has none. It takes a function that runs the call with all arguments, the number of results
    to return, the names of the given tensors, the other given arguments by name, and the tensors.
    Each level of torch.func enters here separately: torch.autograd.Function would restart at the
    top level.
    """
    if op.differentiates:
        setup_context: Callable[..., Any] = _keep_nothing
        backward: Callable[..., Any] = _refuse_second(op)
    elif op.backward:
        setup_context = op.setup_context or functools.partial(_keep_results, op)
        backward = op.backward
    else:
        return None
    ops = {below: _Calls(namespace, below) for below in (True, False)}
    count = len(op.results)
    no_grads = (None,) * count

    def forward(
        ctx: Any,
        run: Callable[..., Any],
        wanted: int,
        names: tuple[str, ...],
        options: dict[str, Any],
        *tensors: Tensor,
    ) -> Any:
        a = op.defaults | options
        a.update(zip(names, tensors, strict=True))
        results = run(*a.values())
        ctx.call = op, names, options
        setup_context(ctx, a, results)
        return results if wanted >= count else results[0] if wanted == 1 else results[:wanted]

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found = backward(ops[_plain()], ctx, *grads, *no_grads[len(grads) :])
        return (None, None, None, None, *map(found.get, ctx.call[1]))

    members: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "backward": differentiate,
        "_compiled_autograd_key": torch.autograd.Function._compiled_autograd_key,
    }
    static = {name: staticmethod(member) for name, member in members.items()}
    function: Any = type(f"{op.name}_autograd", (_SingleLevelFunction,), static)
    apply: Callable[..., Any] = function.apply
    return apply


def needed_gradients(ctx: Any) -> dict[str, bool]:
    """Whether the backward must return the gradient of an argument, by name."""
    needed = zip(ctx.call[1], ctx.needs_input_grad[4:], strict=True)
    return collections.defaultdict(bool, needed)


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


def _redispatch(op: TorchOp, namespace: str, keys: Any, *values: Any) -> Any:
    """The results of the dispatcher's call below autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        keys &= torch._C._after_autograd_keyset
        return op.call(op.overload(namespace).redispatch, values, keys)


def _redispatch_to_next_level(*call: Any) -> Any:
    """_redispatch within torch.func, whose next level records on its own; apply has disabled
    recording.
    """
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _redispatch(*call)


def keep(ctx: Any, a: dict[str, Any], *results: Tensor | None) -> None:
    """Saves, for the backward, the arguments of a call and the results that it needs."""
    ctx.save_for_backward(*map(a.get, ctx.call[1]), *results)
    ctx.set_materialize_grads(False)


def kept(ctx: Any) -> tuple[Any, list[Any]]:
    """The record of the arguments and the results saved by `keep`."""
    (op, names, options), saved = ctx.call, ctx.saved_tensors
    values = op.bind((), options | dict(zip(names, saved, strict=False)))
    return op.record(*values), list(saved[len(names) :])


def _keep_results(op: TorchOp, ctx: Any, a: dict[str, Any], output: Any) -> None:
    results = output if isinstance(output, tuple) else (output,)
    named = dict(zip(op.results, results, strict=True))
    ctx.mark_non_differentiable(*map(named.get, op.constant))
    keep(ctx, a, *map(named.get, op.saves))


def _keep_nothing(ctx: Any, a: dict[str, Any], output: Any) -> None:
    ctx.set_materialize_grads(False)


def _refuse_second(op: TorchOp) -> Callable[..., Any]:
    forward = op.differentiates
    assert forward

    def refuse(ops: Any, ctx: Any, *grads: Tensor | None) -> Any:
        needed = [name for name, n in needed_gradients(ctx).items() if n]
        name = next((name for name in needed if name in forward.arguments), needed[0])
        rule = f"must not be differentiated twice by a kernel, {ELSEWHERE}"
        fail(forward.name, name, rule, next(grad for grad in grads if grad is not None))

    return refuse


def autograd_kernel(op: TorchOp, namespace: str) -> Callable[..., Any]:
    """Registers the operator at the dispatcher's autograd keys, for every level of torch.func."""
    differentiable = bool(op.differentiates or op.backward)

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = op.bind(args, kwargs)
        given = op.named(arguments, {})
        tangent = None
        if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
            tangent = _find_tangent(op, arguments)
        if tangent and (differentiable or op.written):
            _refuse_tangent(op, *tangent)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            refuse_gradient(op, arguments)
            if differentiable:
                if not torch._C._are_functorch_transforms_active():
                    run = functools.partial(_redispatch, op, namespace, keys)
                    return record(op, namespace, given, run)
                run = functools.partial(_redispatch_to_next_level, op, namespace, keys)
                with enable_single_level_autograd_function():
                    return record(op, namespace, given, run)
        results = _redispatch(op, namespace, keys, *arguments)
        note_writes(op, given)
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


def note_writes(op: TorchOp, given: dict[str, Any]) -> None:
    """Notifies autograd that saved tensors were overwritten."""
    for name in op.written:
        t = given.get(name)
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)
