"""The compiled CUDA kernels on devices with little and with much shared memory: 99 KB per CTA
(sm_86) and 227 KB (sm_90a). Tiles, stages and warps that the host chooses by it differ; results do
not, beyond the error budget."""

from __future__ import annotations

import pytest
import torch
from conftest import backends

import tokenmill as tm
from tokenmill.dense.attention_draws import draw_tensor
from tokenmill.registry import Sample
from tokenmill.sparse.bilevel_routing_attention_cases import bilevel_call
from tokenmill.sparse.block_sparse_attention_cases import block_sparse_call
from tokenmill.sparse.landmark_attention_cases import landmark_call
from tokenmill.sparse.sparse_decode_attention_cases import sparse_call

PROFILES = ("sm_86", "sm_90a")
F32, F16 = torch.float32, torch.float16
pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")


def attention_call(d, s=20, **options):
    def make(dtype, g):
        q, k, v = (torch.randn(1, s, heads, d, generator=g).to(dtype) for heads in (2, 1, 1))
        drawn = {name: o(dtype, g) if callable(o) else o for name, o in options.items()}
        return (q, k, v), drawn

    return make


def decode_call(d, group):
    def make(dtype, g):
        q = torch.randn(1, 1, group, d, generator=g).to(dtype)
        k, v = (torch.randn(1, 40, 1, d, generator=g).to(dtype) for _ in range(2))
        return (q, k, v), {"seqlens_k": torch.tensor([33], dtype=torch.int32)}

    return make


def linear_call(d, dv, s=70, **options):
    def make(dtype, g):
        q, k = (torch.randn(1, s, 1, d, generator=g).to(dtype) for _ in range(2))
        return (q, k, torch.randn(1, s, 1, dv, generator=g).to(dtype)), options

    return make


def lists(d):
    return block_sparse_call(sq=20, sk=40, b=1, h=2, hk=1, d=d, dv=d, lists=1, entries=2)


def regions(d):
    return bilevel_call(size=(4, 6), b=1, h=2, hk=1, d=d, dv=d, topk=2, regions=(2, 2))


def landmarks(d):
    return landmark_call(tokens=40, b=1, h=2, hk=1, d=d, dv=d, block=18)


def listed_keys(d, h):
    return sparse_call((37,), h=h, hk=1, d=d, dv=d, lists=1, capacity=40)


# The smallest shapes that reach each rule that depends on shared memory.
CALLS = {
    # pairs of warps per CTA of the backward: 4, 2 or 1
    "attention": [
        (F32, attention_call(128)),
        (F32, attention_call(192)),
        (F32, attention_call(256, bias=draw_tensor(1, 2, 1, 20))),
        (F16, attention_call(192, softcap=5.0)),
        (F16, attention_call(256, softcap=5.0)),
        (F16, attention_call(256, kind="sigmoid")),
    ],
    # rows per tile
    "attention_decode": [(F32, decode_call(128, 64)), (F32, decode_call(256, 33))],
    "sparse_decode_attention": [
        (F32, listed_keys(72, 33)),
        (F32, listed_keys(128, 64)),
        (F32, listed_keys(256, 64)),
        (F16, listed_keys(128, 64)),
    ],
    "block_sparse_attention": [(F32, lists(128)), (F32, lists(256)), (F16, lists(256))],
    "bilevel_routing_attention": [(F32, regions(128)), (F32, regions(256)), (F16, regions(256))],
    # a block of several tiles, which have extra rows
    "landmark_attention": [(F32, landmarks(256)), (F16, landmarks(256)), (F16, landmarks(64))],
    # stages, and columns per slice of values
    "linear_attention": [
        (F16, linear_call(128, 64)),
        (F16, linear_call(128, 72)),
        (F16, linear_call(256, 136)),
        (F32, linear_call(256, 136, s=40)),
        (F16, linear_call(12, 136, feature_map="taylor2", normalize=True)),
        (F32, linear_call(12, 136, s=40, feature_map="taylor2", normalize=True)),
    ],
}
EACH = [
    pytest.param(op, dtype, make, id=f"{op}-{i}")
    for op, calls in CALLS.items()
    for i, (dtype, make) in enumerate(calls)
]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("op", "dtype", "make"), EACH)
def test_any_amount_of_shared_memory_will_do(op, dtype, make, profile):
    with tm.testing.emulated_cuda(device=profile):
        found = tm.testing.compare(tm.registry.get(op), Sample(op, make), "emulated", dtype)
    assert not [c for c in found if not c.ok]
