"""Calls of block_sparse_attention for its tests."""

from __future__ import annotations

import torch
from conftest import device_of
from hypothesis import strategies as st
from strategies import HEAD_DIMS, layouts

import tokenmill as tm
from tokenmill.registry import Sample
from tokenmill.sparse.block_sparse_attention_cases import block_sparse_call

INF, NAN = float("inf"), float("nan")
F16, BF16 = torch.float16, torch.bfloat16
PACKED = {"sq": 150, "sk": 150, "b": 4, "entries": 2, "ends_q": (70, 70, 134, 290)}
PACKED_KEYS = PACKED | {"ends_k": (60, 60, 300, 340)}


def drawn(backend, dtype=torch.float32, seed=0, **options):
    """A call of block_sparse_call on the backend's device."""
    args, kwargs = block_sparse_call(**options)(dtype, torch.Generator().manual_seed(seed))
    device = device_of(backend)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return [a.to(device) for a in args], moved


def drawn_sm90(dtype=F16, seed=0, **options):
    """A call for the sm_90a kernels, on the PTX machine: one request and head, head_dim 64, blocks
    of 64 queries and keys, unless options differ."""
    defaults = {"b": 1, "h": 1, "hk": 1, "lists": 1, "d": 64, "block_q": 64, "block_k": 64}
    options = defaults | options
    options.setdefault("dv", options["d"])
    return block_sparse_call(**options)(dtype, torch.Generator().manual_seed(seed))


def run(backend, args, kwargs, **changes):
    return tm.block_sparse_attention(*args, **{**kwargs, **changes}, backend=backend)


def gradients(results, leaves, seed=1):
    """Gradients of the leaves, for random cotangents of finite results."""
    g = torch.Generator().manual_seed(seed)
    results = [torch.where(torch.isfinite(r), r, 0.0) for r in results]
    cotangents = [torch.randn(r.shape, generator=g).to(r) for r in results]
    return torch.autograd.grad(results, leaves, cotangents)


SECTOR_BYTES = 32


def check_rows_read(launch, streamed, loaded=0):
    """Asserts that a kernel on lists copies `streamed` bytes of rows, plus ids of lists with at
    most three sectors at once, and loads `loaded` bytes of rows, plus lists and statistics."""
    ids = launch["opcodes"]["cp.async.ca.shared.global"]["instructions"]
    copied = launch["global"]["copy"]["sectors"] * SECTOR_BYTES
    assert streamed <= copied <= streamed + 3 * SECTOR_BYTES * ids
    if loaded:
        assert loaded <= launch["global"]["load"]["sectors"] * SECTOR_BYTES <= 1.15 * loaded


def full_lists(q, k, block_q, block_k):
    """One list of every block for all heads."""
    batch, rows, blocks = q.shape[0], -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)
    ids = torch.arange(blocks, dtype=torch.int32, device=q.device)
    indices = ids.expand(batch, 1, rows, blocks).contiguous()
    return indices, torch.full_like(indices[..., 0], blocks)


@st.composite
def block_sparse_samples(draw, longest):
    """Draws a sample with any combination of options."""
    length = st.one_of(
        st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65]), st.integers(0, longest)
    ).filter(lambda n: n <= longest)
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (1, 7)]))
    heads, batch = kv_heads * group, draw(st.integers(0, 2))
    causal = draw(st.booleans())
    few = st.one_of(st.sampled_from([0, 0, 1, longest + 9]), st.integers(0, 40))
    options = {
        "sq": draw(length),
        "sk": draw(length),
        "b": batch,
        "h": heads,
        "hk": kv_heads,
        "d": draw(HEAD_DIMS),
        "dv": draw(HEAD_DIMS),
        "lists": draw(st.sampled_from([1, kv_heads, heads])),
        "entries": draw(st.one_of(st.sampled_from([0, 1]), st.integers(0, 12))),
        "block_q": draw(st.sampled_from([1, 2, 16, 16, 32, 64, 128])),
        "block_k": draw(st.sampled_from([1, 2, 4, 8, 16, 16, 32, 64, 128])),
        "causal": causal,
        "num_sink": draw(few),
        "num_recent": draw(few) if causal else 0,
        "scale": draw(st.sampled_from([None, None, 0.0, 0.3, -0.2])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.5])),
        "hostile": draw(st.booleans()),
        "sink": draw(st.booleans()),
        "return_mass": draw(st.booleans()),
    }
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(-3, longest + 9), min_size=batch, max_size=batch))
        options["seqlens_k"] = torch.tensor(lengths, dtype=torch.int32)
    order, strided = draw(st.tuples(*[st.integers(0, 2)] * 3)), draw(st.booleans())

    def make(dtype, g):
        (*qkv, indices, counts), kwargs = block_sparse_call(**options)(dtype, g)
        qkv = [layouts(t.shape, dtype, g)[i]() for t, i in zip(qkv, order, strict=True)]
        if strided:
            indices, counts = inside(indices), inside(counts)
        return (*qkv, indices, counts), kwargs

    return Sample(f"{options} {order} {strided}", make)


def inside(lists):
    """The same lists as a slice of wider ones."""
    wide = lists.new_full((*lists.shape[:-1], lists.shape[-1] + 3), 1)
    wide[..., 1:-2] = lists
    return wide[..., 1:-2]
