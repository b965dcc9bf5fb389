"""torch.vmap of operators: one call for each element of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call_vmap_helper
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from .._check import fail
from .operator import TorchOp


def vmap_kernel(op: TorchOp, namespace: str) -> Callable[..., Any]:
    """Calls the operator for each element of the batch in turn. torch's own registration refuses
    schemas with keyword-only tensors.
    """

    def run(*values: Any) -> Any:
        return op.run(namespace, values)

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if size == 0:
            fail(op.public_name, op.arguments[0], "must have a batch of at least 1 in vmap", size)
        rows = list(arguments)
        for i, (name, dim) in enumerate(zip(op.arguments, in_dims, strict=True)):
            if name in op.written and dim is None and arguments[i] is not None:
                why = "must be batched by vmap, as the call writes into it"
                fail(op.public_name, name, why, arguments[i])
            if isinstance(dim, int):
                t = arguments[i].movedim(dim, 0)
                if name not in op.written and t.dim() > 1 and t.stride(-1) != 1:
                    t = t.contiguous()
                rows[i] = [t.select(0, row) for row in range(size)]
            else:
                rows[i] = [arguments[i]] * size
        results = [run(*row) for row in zip(*rows, strict=True)]
        if results[0] is None:
            return None, None
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        columns = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return columns, (0,) * len(columns)

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        level: Any = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(level, rule, run, *op.bind(args, kwargs))

    return kernel
