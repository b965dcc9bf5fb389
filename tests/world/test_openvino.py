"""OpenVINO's CPU plugin as an oracle: ScaledDotProductAttention-13 and TopK-11 of
https://docs.openvino.ai (operation specifications). Its float32 kernels run on one thread."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import backends, device_of
from hypothesis import given
from hypothesis import strategies as st
from installed import package
from tier import examples

import tokenmill as tm

openvino = package("openvino")
CLOSE = {"rtol": 1e-5, "atol": 3e-6}
ON_HOST = [b for b in backends("reference") if b in ("cpu", "reference")]
on_host = pytest.mark.parametrize("backend", ON_HOST)


@functools.cache
def core():
    return openvino.Core()


def answer(node_of, *inputs):
    """Outputs of the node that node_of builds from parameters for the inputs."""
    inputs = [x.numpy() for x in inputs]
    parameters = [openvino.opset13.parameter(x.shape, x.dtype) for x in inputs]
    model = openvino.Model(node_of(*parameters).outputs(), parameters)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    found = core().compile_model(model, "CPU", options)(inputs)
    return [torch.from_numpy(found[i].copy()) for i in range(len(found))]


def theirs(q, k, v, *, mask=None, scale=None, causal=False):
    """OpenVINO has heads first, separate keys for each query head, and top-left causal
    alignment."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    inputs = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    if mask is not None:
        inputs.append(mask)

    def node(q, k, v, mask=None):
        options = {"attention_mask": mask, "causal": causal}
        if scale is not None:
            options["scale"] = openvino.opset13.constant(torch.tensor(scale).numpy())
            if mask is None:
                options["attention_mask"] = openvino.opset13.constant(torch.tensor(0.0).numpy())
        return openvino.opset13.scaled_dot_product_attention(q, k, v, **options)

    return answer(node, *inputs)[0].transpose(1, 2)


def drawn(seed, b=2, sq=5, sk=9, h=4, hk=2, d=16, dv=16):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, dv))
    return [torch.randn(shape, generator=g) for shape in shapes]


def mask_of(kind, h, sq, sk):
    """Each row of a boolean mask sees a key: an empty row is NaN there and 0 here."""
    g = torch.Generator().manual_seed(1)
    if kind == "float":
        return torch.randn(1, h, sq, sk, generator=g)
    seen = torch.rand(sq, sk, generator=g) < 0.6
    seen[:, 0] = True
    return seen


CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"causal": True, "sizes": {"sk": 5}},
    "seen": {"mask": "bool"},
    "bias": {"mask": "float", "scale": 0.3, "sizes": {"dv": 8}},
}


@pytest.mark.parametrize(
    ("case", "backend"),
    [(c, b) for b in backends("reference") for c in (CASES if b in ON_HOST else ("bias",))],
)
def test_attention_is_that_of_openvino(case, backend):
    options = dict(CASES[case])
    q, k, v = drawn(0, **options.pop("sizes", {}))
    mask = options.pop("mask", None)
    mask = None if mask is None else mask_of(mask, q.shape[2], q.shape[1], k.shape[1])
    wanted = theirs(q, k, v, mask=mask, **options)
    q, k, v, mask = (t if t is None else t.to(device_of(backend)) for t in (q, k, v, mask))
    found = tm.attention(q, k, v, bias=mask, backend=backend, **options)
    torch.testing.assert_close(found.cpu(), wanted, **CLOSE)


@pytest.mark.skipif(not ON_HOST, reason="neither cpu nor reference is selected")
@examples(6)
@given(
    sq=st.integers(1, 70), sk=st.integers(1, 300), d=st.integers(1, 80), dv=st.integers(1, 80),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2)]), mask=st.sampled_from([None, "bool", "float"]),
)  # fmt: skip
def test_any_attention_is_that_of_openvino(sq, sk, d, dv, heads, mask):
    h, hk = heads
    q, k, v = drawn(2, 1, sq, sk, h, hk, d, dv)
    mask = None if mask is None else mask_of(mask, h, sq, sk)
    wanted = theirs(q, k, v, mask=mask)
    for backend in ON_HOST:
        found = tm.attention(q, k, v, bias=mask, backend=backend)
        torch.testing.assert_close(found, wanted, **CLOSE)


@on_host
@pytest.mark.parametrize(("n", "levels"), [(40, 2), (300, 9), (3000, 1000)])
def test_topk_is_that_of_openvino(n, levels, backend):
    """Values, indices and their order agree; ties go to the lower index."""
    scores = torch.randint(levels, (3, n)).float()
    k = n // 3

    def node(scores):
        count = openvino.opset13.constant(torch.tensor(k).numpy())
        return openvino.opset13.topk(
            scores, count, -1, "max", "value", index_element_type="i32", stable=True
        )

    values, wanted = answer(node, scores)
    options = {"order": "score", "return_values": True, "backend": backend}
    indices, _, found = tm.topk_select(scores, k, **options)
    assert torch.equal(indices, wanted) and torch.equal(found, values)
