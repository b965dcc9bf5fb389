"""native_sparse_attention against a transcription of its formulas, one query at a time."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of

import tokenmill as tm
from tokenmill.sparse import query_lists

SIZES = {
    "block": 8, "stride": 4, "select_block": 8, "topk": 4, "num_first": 1, "num_local": 1,
    "window": 6,
}  # fmt: skip


def inputs(backend, queries, keys, heads=4, kv_heads=2, compressed=None, seed=0):
    """Returns q, k, v, gates, and keys and values of the other branches."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "q": (queries, heads, 8), "k": (keys, kv_heads, 8), "v": (keys, kv_heads, 12),
        "gates": (queries, heads, 3), "k_window": (keys, kv_heads, 8),
        "v_window": (keys, kv_heads, 12), "k_compressed": (compressed, kv_heads, 8),
        "v_compressed": (compressed, kv_heads, 12),
    }  # fmt: skip
    if compressed is None:
        shapes = dict(list(shapes.items())[:4])
    tensors = {n: torch.randn(1, *s, generator=g).to(device_of(backend)) for n, s in shapes.items()}
    return {n: t.requires_grad_() for n, t in tensors.items()}


def attend(q, k, v):
    return torch.softmax(k @ q * 8**-0.5, 0) @ v if len(k) else v.new_zeros(v.shape[1])


def by_hand(
    q, k, v, gates, *, block, stride, select_block, topk, num_first, num_local, window,
    k_compressed=None, v_compressed=None, k_window=None, v_window=None,
):  # fmt: skip
    queries, keys, heads, kv_heads = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    count = max((keys - block) // stride + 1, 0)
    k_window, v_window = (k, v) if k_window is None else (k_window, v_window)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for i in range(queries):
        t = keys - queries + i
        for kv in range(kv_heads if t >= 0 else 0):
            if k_compressed is None:
                coarse = [
                    torch.stack([x[0, c * stride : c * stride + block, kv].mean(0) for c in
                                 range(count)]) if count else x[0, :0, kv]
                    for x in (k, v)
                ]  # fmt: skip
            else:
                coarse = [x[0, :, kv] for x in (k_compressed, v_compressed)]
            complete = [c for c in range(count) if c * stride + block - 1 <= t]
            own = t // select_block
            importance = torch.zeros(own + 1, dtype=q.dtype)
            group = range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
            for h in group if complete else ():
                p = torch.softmax(coarse[0][complete] @ q[0, i, h] * 8**-0.5, 0).detach()
                for j in range(own + 1):
                    for m in range(select_block // stride):
                        for n in range(block // stride):
                            c = select_block // stride * j + m - n
                            if c in complete:
                                importance[j] += p[c]
            always = {*range(min(num_first, own + 1)), *range(max(own + 1 - num_local, 0), own + 1)}
            order = sorted(range(own + 1), key=lambda j, x=importance: (-x[j].item(), j))
            chosen = {*always, *[j for j in order if j not in always][: topk - len(always)]}
            seen = [j for j in range(t + 1) if j // select_block in chosen]
            for h in group:
                near = slice(max(t + 1 - window, 0), t + 1)
                parts = (
                    attend(q[0, i, h], coarse[0][complete], coarse[1][complete]),
                    attend(q[0, i, h], k[0, seen, kv], v[0, seen, kv]),
                    attend(q[0, i, h], k_window[0, near, kv], v_window[0, near, kv]),
                )
                out[0, i, h] = sum(gates[0, i, h, c] * part for c, part in enumerate(parts))
    return out


CASES = {
    "means": ((21, 21), (4, 2), {}),
    "a chunk, given keys": ((4, 38), (3, 1), {"compressed": 8, "stride": 4}),
    "fewer tokens than a block": ((7, 5), (2, 2), {"topk": 16, "num_local": 2, "window": 512}),
    "no overlap": ((22, 22), (2, 1), {"block": 4, "num_first": 0, "num_local": 2, "topk": 2}),
}


# The kernels have their own tests: other backends run one case.
RUNS = [(b, c) for b in backends("reference") for c in CASES if b == "cpu" or c == "means"]


@pytest.mark.parametrize(("backend", "case"), RUNS)
def test_formulas_forward_and_backward(backend, case):
    (queries, keys), heads, options = CASES[case]
    options = dict(options)
    given = inputs(backend, queries, keys, *heads, options.pop("compressed", None))
    sizes = {**SIZES, **options}
    out = tm.native_sparse_attention(**given, **sizes, backend=backend)
    exact = {n: t.detach().double().cpu().requires_grad_() for n, t in given.items()}
    want = by_hand(**exact, **sizes)
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=1e-5)
    dout = torch.randn(want.shape, dtype=torch.float64)
    want.backward(dout)
    out.backward(dout.to(out))
    for name, leaf in given.items():
        torch.testing.assert_close(
            leaf.grad.cpu().double(), exact[name].grad, rtol=1e-4, atol=1e-5, msg=name
        )


def test_stripes_and_16_bits(monkeypatch):
    given = {n: t.detach() for n, t in inputs("cpu", 41, 41).items()}
    want = tm.native_sparse_attention(**given, **SIZES)
    monkeypatch.setattr(query_lists, "CPU_ELEMENTS", 64)
    assert torch.equal(tm.native_sparse_attention(**given, **SIZES), want)
    half = {n: t.bfloat16() for n, t in given.items()}
    exact = by_hand(**{n: t.double() for n, t in half.items()}, **{**SIZES, "topk": 9})
    out = tm.native_sparse_attention(**half, **{**SIZES, "topk": 9})
    assert out.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        cast = {n: t.float() for n, t in half.items()}
        assert torch.equal(tm.native_sparse_attention(**cast, **{**SIZES, "topk": 9}), out)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * 2**-8 * exact.abs().max())


def test_malformed_calls():
    given = inputs("cpu", 9, 20, compressed=4)
    q, k = given["q"], given["k"]
    for options, rule in (
        ({"block": 6}, "block: must be a multiple of stride, 4, below 2^31; got 6"),
        ({"select_block": 24}, "select_block: must be a power of two up to 128; got 24"),
        ({"select_block": 2}, "select_block: must be a multiple of stride, 4; got 2"),
        ({"topk": 1}, "topk: must be at least num_first + num_local, 2; got 1"),
        ({"window": 0}, "window: must be at least 1; got 0"),
        ({"k_compressed": None}, "k_compressed: must be given with v_compressed; got None"),
        ({"k_compressed": k[:, :3], "v_compressed": given["v"][:, :3]},
         "k_compressed: must have floor((Sk - block) / stride) + 1 keys, 4; got 3"),
        ({"v_window": k}, "v_window: must have shape [1, 20, 2, 12]; got [1, 20, 2, 8]"),
        ({"gates": q}, "gates: must have shape [1, 9, 4, 3]; got [1, 9, 4, 8]"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError) as error:
            tm.native_sparse_attention(**{**given, **SIZES, **options})
        assert str(error.value) == f"tokenmill.native_sparse_attention: {rule}"
