"""attention with few queries and many keys, which its CPU kernel passes to the decode engine."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants

import tokenmill as tm
from tokenmill import masks, registry
from tokenmill.dense.attention_cases import with_options
from tokenmill.dense.attention_draws import draw_tensor
from tokenmill.testing import compare

pytestmark = pytest.mark.skipif("cpu" not in backends(), reason="no CPU backend")
B, SK, H = 2, 400, 6

OPTIONS = {
    "plain": {"causal": True, "return_lse": True},
    "window": {"window": (170, 0), "sink": draw_tensor(H), "softcap": 3.0, "return_lse": True},
    "slopes": {
        "alibi_slopes": draw_tensor(B, H, positive=True),
        "score_bias": draw_tensor(B, H),
        "causal": True,
    },
    "sigmoid": {"kind": "sigmoid", "score_bias": "neg_log_n", "precision": "fast"},
    "relu by count": {"kind": "relu", "normalize": "count", "window": (190, 0)},
    "elu1 by sum": {"kind": "elu1", "normalize": "sum", "return_lse": True},
    "masks": {
        "mask": (
            masks.prefix(torch.tensor([390, 0], dtype=torch.int32)),
            masks.segments(
                torch.ones(1, 2, dtype=torch.int32),
                torch.arange(SK, dtype=torch.int32)[None] // 150,
                rule="not_after",
            ),
        )
    },
}


def call(sq, hk, options):
    def make(dtype, g):
        shapes = (B, sq, H, 24), (B, SK, hk, 24), (B, SK, hk, 40)
        tensors = tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)
        return tensors, with_options(options, dtype, g)

    return make


@pytest.mark.parametrize("isa", [i for b, i in cpu_variants() if b == "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_few_queries_keep_the_error_budget(name, dtype, isa):
    """Gradients are checked too: they use the lse and row sums of this engine."""
    rows = [(2, 3)] if name == "masks" else [(1, 6), (2, 3)]
    for sq, hk in rows:
        sample = registry.Sample(name, call(sq, hk, OPTIONS[name]))
        assert not [c for c in compare(registry.get("attention"), sample, "cpu", dtype) if not c.ok]


def test_few_queries_have_the_bits_of_a_decode():
    """Bits agree up to the number of rows that share a key and the number of keys that each
    needs."""
    g = torch.Generator().manual_seed(0)
    for sq, h, hk, keys, window, same in (
        (1, 6, 3, 400, None, True),
        (1, 36, 1, 130, None, True),
        (2, 6, 3, 400, None, True),
        (2, 6, 3, 100, None, False),
        (2, 6, 3, 400, (100, 0), False),
        (5, 2, 1, 2570, None, True),
        (5, 2, 1, 2550, None, False),
    ):
        q, k, v = (torch.randn(B, s, n, 24, generator=g) for s, n in ((sq, h), *((keys, hk),) * 2))
        lengths = torch.full((B,), keys, dtype=torch.int32)
        options = {"return_lse": True} | ({"window": window} if window else {})
        want = tm.attention_decode(q, k, v, seqlens_k=lengths, **options)
        found = tm.attention(q, k, v, causal=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)) == same
        torch.testing.assert_close(found, want)


def test_few_queries_of_any_layout():
    """Bits do not depend on strides, threads or the destination."""
    (q, k, v), _ = call(2, 3, {})(torch.float32, torch.Generator().manual_seed(1))
    want = tm.attention(q, k, v, causal=True)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    out = torch.zeros(B, 2, H, 50)[..., 3:43]
    assert tm.attention(*heads_first, causal=True, out=out) is out
    assert torch.equal(out, want)


@pytest.mark.parametrize("where", ["k", "v"])
def test_a_hidden_value_touches_no_row(where):
    (q, k, v), _ = call(2, 3, {})(torch.float32, torch.Generator().manual_seed(2))
    want = tm.attention(q, k, v, causal=True)
    (k if where == "k" else v)[0, -1] = float("nan")
    got = tm.attention(q, k, v, causal=True)
    torch.testing.assert_close(got[:, 0], want[:, 0])
    assert got[0, 1].isnan().all() and not got[1].isnan().any()
