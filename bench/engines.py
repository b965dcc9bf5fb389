"""Engines for CPUs as peers: onnxruntime, OpenVINO, JAX, ZenTorch and NumPy.

A factory takes the case's tensors and options, lays the tensors out as the engine likes them, with
as many threads as torch has, and returns its call. The call's result is [B, S, H, D]. Inputs and
outputs are bound once: a call is the engine's work and its least overhead.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Absent

Call = Callable[[], Tensor]


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, D] -> [B, H, S, D], contiguous."""
    return [t.transpose(1, 2).contiguous() for t in tensors]


def folded(q: Tensor, k: Tensor) -> Tensor:
    """[B, 1, H, D] -> [B, Hk, H / Hk, D]: queries of a group as rows of one matrix, so that each
    key is read once."""
    return q[:, 0].unflatten(1, (k.shape[2], -1)).contiguous()


def _refuse_window(engine: str, left: int) -> None:
    if left >= 0:
        raise Absent(f"{engine}: no window without a matrix")


# onnxruntime


def _onnx_session(
    op: str,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    *,
    domain: str = "",
    opset: int = 23,
    order: Sequence[str] | None = None,
    **attributes: Any,
) -> Callable[[], None]:
    """A call of one operator, which reads inputs and writes outputs. order: names of the operator's
    inputs, "" where an optional one is left out; None: those of `inputs`."""
    import onnx
    import onnxruntime

    types = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
        torch.int32: onnx.TensorProto.INT32,
        torch.int64: onnx.TensorProto.INT64,
    }
    helper = onnx.helper

    def described(tensors: Mapping[str, Tensor]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, types[t.dtype], [*t.shape])
            for name, t in tensors.items()
        ]

    names = [*inputs] if order is None else [*order]
    node = helper.make_node(op, names, [*outputs], domain=domain, **attributes)
    graph = helper.make_graph([node], op, described(inputs), described(outputs))
    sets = [helper.make_opsetid("", opset)]
    if domain:
        sets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    bound = session.io_binding()
    held = inputs, outputs  # the binding has their addresses
    for name, t in inputs.items():
        bound.bind_input(name, "cpu", 0, types[t.dtype], [*t.shape], t.data_ptr())
    for name, t in outputs.items():
        bound.bind_output(name, "cpu", 0, types[t.dtype], [*t.shape], t.data_ptr())

    def run() -> None:
        assert held
        session.run_with_iobinding(bound)

    return run


def onnx_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, left: int = -1
) -> Call:
    """Attention-23, heads first."""
    _refuse_window("onnxruntime", left)
    inputs = dict(zip("QKV", heads_first(q, k, v), strict=True))
    found = torch.empty_like(inputs["Q"])
    run = _onnx_session("Attention", inputs, {"Y": found}, is_causal=int(causal))
    return _then(run, found.transpose(1, 2))


def onnx_multi_head_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, left: int = -1
) -> Call:
    """com.microsoft's MultiHeadAttention, in our layout."""
    _refuse_window("onnxruntime", left)
    if q.shape[2] != k.shape[2]:
        raise Absent("onnxruntime MultiHeadAttention: as many KV heads as query heads")
    inputs = {
        name: t.flatten(2).contiguous()
        for name, t in zip(("query", "key", "value"), (q, k, v), strict=True)
    }
    found = torch.empty_like(inputs["query"])
    run = _onnx_session(
        "MultiHeadAttention", inputs, {"output": found}, domain="com.microsoft",
        num_heads=q.shape[2], unidirectional=int(causal),
    )  # fmt: skip
    return _then(run, found.unflatten(2, q.shape[2:]))


def onnx_decode(q: Tensor, k: Tensor, v: Tensor, *, seqlens_k: Tensor) -> Call:
    """com.microsoft's GroupQueryAttention: it writes the newest token into the cache, heads first,
    and attends to it."""
    _equal_lengths("onnxruntime", q, k, seqlens_k)
    length = k.shape[1]
    past_k, past_v = heads_first(k, v)
    new = {"key": k[:, -1:], "value": v[:, -1:], "query": q}
    rows = {name: t.flatten(2).contiguous() for name, t in new.items()}
    inputs = {
        "query": rows["query"],
        "key": rows["key"],
        "value": rows["value"],
        "past_key": past_k,
        "past_value": past_v,
        "seqlens_k": (seqlens_k - 1).to(torch.int32),
        "total_sequence_length": torch.tensor([length], dtype=torch.int32),
    }
    found = torch.empty_like(rows["query"])
    outputs = {"output": found, "present_key": past_k, "present_value": past_v}
    run = _onnx_session(
        "GroupQueryAttention", inputs, outputs, domain="com.microsoft",
        num_heads=q.shape[2], kv_num_heads=k.shape[2],
    )  # fmt: skip
    return _then(run, found.unflatten(2, q.shape[2:]))


def onnx_topk(scores: Tensor, *, k: int) -> Call:
    values, indices = scores.new_empty(len(scores), k), torch.empty(len(scores), k).long()
    inputs = {"X": scores, "K": torch.tensor([k])}
    run = _onnx_session("TopK", inputs, {"Values": values, "Indices": indices}, opset=24)
    return lambda: (run(), indices)[1].sort()[0].int()


def _then(run: Callable[[], None], found: Tensor) -> Call:
    def call() -> Tensor:
        run()
        return found

    return call


def _equal_lengths(engine: str, q: Tensor, k: Tensor, seqlens_k: Tensor) -> None:
    if q.shape[1] != 1 or int(seqlens_k.min()) < k.shape[1]:
        raise Absent(f"{engine}: one query and equal lengths")


# OpenVINO


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _openvino(inputs: Sequence[Tensor], causal: bool = False) -> Call:
    """ScaledDotProductAttention-13 of tensors with heads first, in their precision."""
    import openvino

    kinds = {
        torch.float32: (openvino.Type.f32, "f32"),
        torch.bfloat16: (openvino.Type.bf16, "bf16"),
    }
    if inputs[0].dtype not in kinds:
        raise Absent("OpenVINO: float16 is computed in bfloat16")
    kind, hint = kinds[inputs[0].dtype]
    parameters = [openvino.opset13.parameter([*t.shape], kind) for t in inputs]
    node = openvino.opset13.scaled_dot_product_attention(*parameters, causal=causal)
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    compiled = _core().compile_model(openvino.Model([node], parameters), "CPU", options)
    request, found = compiled.create_infer_request(), torch.empty_like(inputs[0])
    bound = [openvino.Tensor(_words(t), [*t.shape], kind) for t in (*inputs, found)]
    for i, tensor in enumerate(bound[:-1]):
        request.set_input_tensor(i, tensor)
    request.set_output_tensor(0, bound[-1])
    held = [*inputs, found]  # `bound` has their addresses

    def run() -> None:
        assert held
        request.infer()

    return _then(run, found)


def openvino_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, left: int = -1
) -> Call:
    _refuse_window("OpenVINO", left)
    group = q.shape[2] // k.shape[2]
    run = _openvino(heads_first(q, *(t.repeat_interleave(group, 2) for t in (k, v))), causal)
    return lambda: run().transpose(1, 2)


def openvino_decode(q: Tensor, k: Tensor, v: Tensor, *, seqlens_k: Tensor) -> Call:
    _equal_lengths("OpenVINO", q, k, seqlens_k)
    run = _openvino([folded(q, k), *heads_first(k, v)])
    return lambda: run().flatten(1, 2)[:, None]


def openvino_model(model: torch.nn.Module, inputs: Sequence[Tensor]) -> Call:
    """A module that takes tensors of these shapes and returns one, converted as OpenVINO does."""
    import openvino

    dtype = next(model.parameters()).dtype
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        converted = openvino.convert_model(
            model, example_input=tuple(inputs), input=[[*t.shape] for t in inputs]
        )
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    request = _core().compile_model(converted, "CPU", options).create_infer_request()
    arrays = [t.numpy() for t in inputs]
    return lambda: torch.from_numpy(request.infer(arrays)[0])


def _words(t: Tensor) -> Any:
    """The memory of a tensor as an array of NumPy, which has no bfloat16."""
    return t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


# JAX


@functools.cache
def _jax() -> Any:
    """JAX makes as many threads as the calling thread may use processors."""
    import jax

    if torch.get_num_threads() == 1:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        jax.devices()  # makes the threads
        os.sched_setaffinity(0, before)
    return jax


def jax_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, left: int = -1) -> Call:
    """jax.nn.dot_product_attention, in our layout."""
    jax = _jax()
    arrays = [jax.dlpack.from_dlpack(t.contiguous()) for t in (q, k, v)]
    window = (left, 0) if left >= 0 else None
    attend = jax.jit(
        functools.partial(jax.nn.dot_product_attention, is_causal=causal, local_window_size=window)
    )
    return lambda: torch.from_dlpack(attend(*arrays).block_until_ready())


def jax_decode(q: Tensor, k: Tensor, v: Tensor, *, seqlens_k: Tensor) -> Call:
    _equal_lengths("JAX", q, k, seqlens_k)
    return jax_attention(q, k, v)


# PyTorch and NumPy


def _zentorch(inputs: Sequence[Tensor], causal: bool = False) -> Call:
    import zentorch  # noqa: F401  # registers its operators

    attend = torch.ops.zentorch.zentorch_sdpa
    return lambda: attend(*inputs, is_causal=causal)[0]


def zentorch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, left: int = -1
) -> Call:
    _refuse_window("ZenTorch", left)
    run = _zentorch(heads_first(q, k, v), causal)
    return lambda: run().transpose(1, 2)


def zentorch_decode(q: Tensor, k: Tensor, v: Tensor, *, seqlens_k: Tensor) -> Call:
    _equal_lengths("ZenTorch", q, k, seqlens_k)
    run = _zentorch([folded(q, k), *heads_first(k, v)])
    return lambda: run().flatten(1, 2)[:, None]


def folded_sdpa(q: Tensor, k: Tensor, v: Tensor, *, seqlens_k: Tensor) -> Call:
    """SDPA reads each key once for the rows of a matrix, and once a head with enable_gqa."""
    _equal_lengths("SDPA", q, k, seqlens_k)
    rows, (k, v) = folded(q, k), heads_first(k, v)
    return lambda: F.scaled_dot_product_attention(rows, k, v).flatten(1, 2)[:, None]


def numpy_topk(scores: Tensor, *, k: int) -> Call:
    import numpy as np

    array = scores.numpy()
    columns = array.shape[1]

    def call() -> Tensor:
        found = np.argpartition(array, columns - k, axis=1)[:, columns - k :]
        return torch.from_numpy(np.sort(found, axis=1)).int()

    return call
