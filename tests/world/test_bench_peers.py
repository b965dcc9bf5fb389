"""The engines of bench compute what our operators compute."""

from __future__ import annotations

import pytest
import torch
from installed import package

import tokenmill as tm
from tokenmill.bench import packages

for name in ("onnx", "onnxruntime", "openvino", "jax"):
    package(name)
CANNOT = {"ZenTorch"}  # needs a torch of its own version


def built(op, tensors, expected, **options):
    builders = packages.builders(op, tensors, expected, lambda f, t: lambda: f(*t), **options)
    return {name: build for name, build in builders.items() if name not in CANNOT}


def drawn(sq, sk, heads, kv_heads, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, sq, heads, 16), (2, sk, kv_heads, 16), (2, sk, kv_heads, 16))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    q, k, v = drawn(9, 9, 4, 4)
    want = tm.attention(q, k, v, causal=causal)
    peers = built("attention", [q, k, v], lambda: want, causal=causal, left=-1)
    assert {*peers} == {"onnxruntime", "onnxruntime MHA", "OpenVINO", "JAX"}
    for build in peers.values():
        torch.testing.assert_close(build()(), want, rtol=0, atol=1e-5)


def test_attention_in_bfloat16():
    q, k, v = drawn(9, 9, 4, 4, torch.bfloat16)
    want = tm.attention(q, k, v)
    found = built("attention", [q, k, v], lambda: want, causal=False, left=-1)["OpenVINO"]()()
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)


def test_decode():
    q, k, v = drawn(1, 12, 6, 2)
    lengths = torch.full((2,), 12, dtype=torch.int32)
    want = tm.attention_decode(q, k, v, seqlens_k=lengths)
    peers = built("attention_decode", [q, k, v], lambda: want, seqlens_k=lengths)
    assert {*peers} == {"onnxruntime", "OpenVINO", "JAX", "SDPA, folded"}
    for build in peers.values():
        torch.testing.assert_close(build()(), want, rtol=0, atol=1e-5)


def test_topk():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    want = tm.topk_select(scores, 7)[0]
    peers = built("topk_select", [scores], lambda: want, k=7)
    assert {*peers} == {"onnxruntime", "argpartition"}
    for build in peers.values():
        assert torch.equal(build()(), want)


def test_another_result_is_not_timed():
    q, k, v = drawn(9, 9, 4, 4)
    other = tm.attention(q, k, v, scale=0.9)
    for build in built("attention", [q, k, v], lambda: other, causal=False, left=-1).values():
        with pytest.raises(packages.Absent, match="another result"):
            build()
