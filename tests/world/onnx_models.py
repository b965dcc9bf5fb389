"""Models of one ONNX operator, run by onnxruntime on one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from installed import package

onnx, onnxruntime = package("onnx"), package("onnxruntime")
MICROSOFT = "com.microsoft"  # onnxruntime's own operators
COMPLETE = (1, 32)  # the first release with a kernel for every operator of these tests
MISSING = ("No Op registered", "is not a registered", "Could not find an implementation")


def answer(
    op: str,
    inputs: Sequence[torch.Tensor | None],
    outputs: int = 1,
    *,
    opset: int = 24,
    domain: str = "",
    output_types: Sequence[torch.dtype] = (),
    **attributes: Any,
) -> list[torch.Tensor]:
    """The outputs of one operator. None omits an optional input; output_types: types that differ
    from the type of the first input. The test is skipped if an older build does not have the
    operator."""
    helper = onnx.helper

    def described(name, dtype, shape=None):
        kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
        return helper.make_tensor_value_info(name, kind, shape)

    given = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    names = [f"x{i}" if f"x{i}" in given else "" for i in range(len(inputs))]
    results = [f"y{i}" for i in range(outputs)]
    types = [*output_types, *[inputs[0].dtype] * outputs][:outputs]
    node = helper.make_node(op, names, results, domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [described(name, x.dtype, list(x.shape)) for name, x in given.items()],
        [described(name, dtype) for name, dtype in zip(results, types, strict=True)],
    )
    sets = [helper.make_opsetid("", opset)]
    if domain:
        sets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # several classes, none of which is public
        version = tuple(int(n) for n in onnxruntime.__version__.split(".")[:2])
        if version < COMPLETE and any(words in str(error) for words in MISSING):
            pytest.skip(f"not installed: onnxruntime with {op} of opset {domain or opset}")
        raise
    found = session.run(None, {name: np.ascontiguousarray(x) for name, x in given.items()})
    return [torch.from_numpy(x) for x in found]
