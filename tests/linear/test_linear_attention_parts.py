"""One sequence split into parts, as CUDA runs it with few heads: a chain of parts that pass on
their states, or a scan of states if there are many parts."""

from __future__ import annotations

import pytest
import torch
from conftest import backends
from each import DTYPES, randn
from linear_oracle import chunked, inputs, relative_error

import tokenmill as tm
from tokenmill import registry
from tokenmill._call import choose
from tokenmill.linear.linear_attention_cases import draw_state

PART = 256  # tokens per part of a short sequence

each_kernel = pytest.mark.parametrize(
    "backend", [b for b in backends() if b in ("cuda", "emulated")]
)
# Chains of two, three and five parts, with or without a short last part; seven parts, scanned.
each_length = pytest.mark.parametrize("length", [PART + 1, 3 * PART - 30, 5 * PART, 6 * PART + 70])
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1.5e-2}


def gates(length, heads, backend):
    x = torch.nn.functional.logsigmoid(randn(1, length, heads, backend=backend) + 4)
    x[:, length // 2] = -float("inf")
    return x


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@each_length
def test_out_and_state(length, gated, dtype, backend):
    q, k, v = inputs(backend, length, heads=2, kv_heads=1, d=24, dv=40, dtype=dtype)
    decay = gates(length, 2, backend) if gated else torch.tensor([-0.004, -0.3]).to(q.device)
    options = {"log_decay": decay, "initial_state": randn(1, 2, 24, 40, backend=backend)}
    wide = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    got = tm.linear_attention(q, k, v, return_final_state=True, backend=backend, **options)
    for a, b in zip(got, chunked(q, *wide, **options), strict=True):
        assert relative_error(a, b) < LIMITS[dtype]


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("feature_map", "normalize", "d"),
    [("elu1", True, 24), ("taylor2", True, 6), ("taylor2", False, 6), ("silu", False, 200)],
)
@pytest.mark.parametrize("length", [3 * PART - 30, 5 * PART + 1])
def test_states_of_any_kind(length, feature_map, normalize, d, dtype, backend):
    """States with a normalizer; taylor2 and wide heads pass through memory in steps of features."""
    q, k, v = inputs(backend, length, d=d, dv=20, dtype=dtype)
    if not normalize:
        q, k = q / 4, k / 4
    state = draw_state((1, 2, d, 20), feature_map, normalize, torch.float32, torch.Generator())
    options = {
        "log_decay": torch.tensor([-0.01, -0.4]).to(q.device),
        "initial_state": state.to(q.device),
        "feature_map": feature_map,
        "normalize": normalize,
    }
    got = tm.linear_attention(q, k, v, return_final_state=True, backend=backend, **options)
    for a, b in zip(got, chunked(q, k, v, **options), strict=True):
        assert relative_error(a, b) < LIMITS[dtype]


@each_kernel
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("length", [2 * PART + 40, 5 * PART + 40])
def test_gradients(length, normalize, gated, backend):
    q, k, v = inputs(backend, length, heads=2, d=12, dv=20)
    decay = gates(length, 2, backend) if gated else torch.tensor([-0.003, -0.9]).to(q.device)
    map_name = "elu1" if normalize else "identity"
    state = draw_state((1, 2, 12, 20), map_name, normalize, torch.float32, torch.Generator())
    tensors = (q, k, v, decay, state.to(q.device))
    options = {"feature_map": map_name, "normalize": normalize}
    weights = [randn(1, length, 2, 20), randn(*state.shape)]

    def gradients(function, tensors, **more):
        leaves = [t.detach().requires_grad_() for t in tensors]
        q, k, v, decay, state = leaves
        results = function(q, k, v, log_decay=decay, initial_state=state, **options, **more)
        cotangents = [w.to(r) for w, r in zip(weights, results, strict=True)]
        return torch.autograd.grad(results, leaves, cotangents)

    found = gradients(tm.linear_attention, tensors, return_final_state=True, backend=backend)
    wanted = gradients(chunked, [t.double() for t in tensors])
    for name, a, b in zip(("q", "k", "v", "decay", "state"), found, wanted, strict=True):
        assert relative_error(a, b) < (1e-4 if name == "decay" else 1e-5), name


@each_kernel
@pytest.mark.parametrize("gated", [False, True])
def test_packed_sequences_are_cut_each(gated, backend):
    lengths = [40, 0, 3 * PART - 1, PART, 2 * PART + 5]
    total, heads = sum(lengths), 2
    q, k, v = (t[0] for t in inputs(backend, total))
    state = randn(5, heads, 16, 16, backend=backend)
    decay = gates(total, heads, backend)[0] if gated else torch.tensor([-0.01, -0.2]).to(q.device)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out, final = tm.linear_attention(
        q, k, v, log_decay=decay, initial_state=state, return_final_state=True,
        cu_seqlens=ends.to(q.device), backend=backend,
    )  # fmt: skip
    for n, (a, b) in enumerate(zip(ends.tolist(), ends.tolist()[1:], strict=False)):
        alone, after = tm.linear_attention(
            *(t[None, a:b] for t in (q, k, v)),
            log_decay=decay[None, a:b] if gated else decay,
            initial_state=state[n : n + 1], return_final_state=True, backend=backend,
        )  # fmt: skip
        assert torch.equal(out[a:b], alone[0]) and torch.equal(final[n : n + 1], after)


@each_kernel
@pytest.mark.parametrize(
    "ends",
    [(0, 900, 100, 1000), (-5, 2000, 3, 1000), (1000, 700, 600, 0), (0, 2000, 0, 2000, 0, 2000)],
    ids=str,
)
@pytest.mark.parametrize("total", [1000, 2000])
def test_wrong_ends_of_packed_sequences_wait_for_nobody(total, ends, backend):
    q, k, v = (t[0] for t in inputs(backend, total))
    spec = registry.get("linear_attention")
    cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(q.device)
    lowered = spec.lower(q, k, v, cu_seqlens=cu_seqlens)
    out = spec.forward.run(choose.namespace(backend), lowered)[0]
    assert out.shape == q.shape


@pytest.mark.parametrize("backend", [b for b in backends() if b == "emulated"])
@pytest.mark.parametrize("length", [3 * PART + 9, 6 * PART])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_blocks_gives_the_same_bits(seed, length, backend):
    from tokenmill import _emulator

    q, k, v = inputs(backend, length, heads=3, d=12, dv=20, dtype=torch.float16)
    options = {"return_final_state": True, "backend": backend, "feature_map": "elu1"}
    options |= {"normalize": True, "log_decay": torch.tensor([-0.01, -0.2, 0.0])}
    want = tm.linear_attention(q, k, v, **options)
    for order in ("reverse", "seeded"):
        with _emulator.configured(f"order={order},seed={seed}"):
            got = tm.linear_attention(q, k, v, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
