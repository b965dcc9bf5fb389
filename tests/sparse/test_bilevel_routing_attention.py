"""bilevel_routing_attention: any call, identities, routing, and memory that must not be read."""

from __future__ import annotations

import pytest
import torch
from bilevel_calls import bilevel_samples
from block_sparse_calls import NAN, gradients
from conftest import assert_same, backends, cpu_variants, device_of
from each import each_backend, each_dtype, each_kernel
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm
from tokenmill import registry
from tokenmill.bench.bilevel_routing_attention import gathered_attention
from tokenmill.sparse.bilevel_routing_attention_cases import bilevel_call
from tokenmill.testing import compare

SPEC = registry.get("bilevel_routing_attention")


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(60)
@given(sample=bilevel_samples(longest=40))
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    assert not [c for c in compare(SPEC, sample, backend, dtype) if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_dtype
@examples(4)
@given(sample=bilevel_samples(longest=14))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


LARGE = [
    registry.Sample(f"{size} {options}", bilevel_call(size, b=1, h=2, hk=1, d=40, dv=72, **options))
    for size, options in (
        ((40, 40), {"regions": (5, 5), "topk": 4}),
        ((37, 50), {"regions": (3, 2), "topk": 3}),
        ((37, 50), {"regions": (3, 2), "topk": 3, "mask_padding": False}),
        ((20, 20), {"regions": (5, 5), "topk": 16, "graphs": 2}),
    )
]


@pytest.mark.parametrize("isa", [i for b, i in cpu_variants() if b == "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", LARGE, ids=lambda sample: sample.name)
def test_large_maps_cross_every_tile_border(sample, dtype, isa):
    assert not [c for c in compare(SPEC, sample, "cpu", dtype) if not c.ok]


def maps(backend, size=(13, 11), b=2, h=4, hk=2, d=16, seed=0, key_size=None):
    g = torch.Generator().manual_seed(seed)
    shapes = ((*size, h), (*(key_size or size), hk), (*(key_size or size), hk))
    return [torch.randn(b, *s, d, generator=g).to(device_of(backend)) for s in shapes]


def leaves_of(tensors):
    return [t.detach().requires_grad_() for t in tensors]


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# --- identities -------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("key_size", [None, (7, 9)])
def test_all_regions_are_attention(backend, key_size):
    leaves = leaves_of(maps(backend, key_size=key_size))
    got = tm.bilevel_routing_attention(*leaves, regions=3, topk=9, return_lse=True, backend=backend)
    grads = gradients(got, leaves)
    flat = leaves_of([t.detach().flatten(1, 2) for t in leaves])
    want = tm.attention(*flat, return_lse=True, backend="reference")
    close([got[0].flatten(1, 2), got[1].flatten(2)], want)
    dense = gradients([want[0].view_as(got[0]), want[1].view_as(got[1])], flat)
    close([t.flatten(1, 2) for t in grads], dense)


@each_backend
@examples(4)
@given(
    height=st.integers(4, 17),
    width=st.integers(4, 17),
    parts=st.integers(2, 4),
    topk=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_unmasked_padding_is_the_published_formulation(height, width, parts, topk, seed, backend):
    """The map is zero-padded after the projection, and keys and values are gathered."""
    leaves = leaves_of(maps(backend, (height, width), b=1, h=2, hk=2, d=8, seed=seed))
    size = (height // parts, width // parts)
    out, graph = tm.bilevel_routing_attention(
        *leaves, region_size=size, topk=topk, mask_padding=False, return_graph=True,
        backend=backend,
    )  # fmt: skip
    grads = gradients([out], leaves)
    others = leaves_of(leaves)
    want = gathered_attention(*others, graph[:, 0], size, 8**-0.5)
    close([out, *grads], [want, *gradients([want], others)])


@each_backend
def test_order_and_repetition_in_a_graph_do_not_matter(backend):
    q, k, v = maps(backend)
    graph = torch.tensor([4, 0, 2, 3]).int().repeat(2, 1, 9, 1).to(q.device)
    other = torch.tensor([-1, 3, 2, 99, 2, 4, 0, -7, 9]).int().repeat(2, 1, 9, 1).to(q.device)
    a, b = (
        tm.bilevel_routing_attention(
            q, k, v, regions=3, region_graph=g, mask_padding=False, backend=backend
        )
        for g in (graph, other)
    )
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# --- routing ----------------------------------------------------------------------------------


@each_backend
@examples(8)
@given(data=st.data())
def test_routing_takes_the_largest_products_of_means(data, backend):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    size = data.draw(st.tuples(st.integers(3, 12), st.integers(3, 12)))
    region = data.draw(st.sampled_from([(1, 2), (2, 2), (3, 2), (4, 4)]))
    rows, columns = (-(-n // r) for n, r in zip(size, region, strict=True))
    topk = data.draw(st.integers(1, rows * columns))

    def whole(heads):  # sums are exact: 48 is a multiple of every region's pixel count
        x = 48 * torch.randint(-2, 3, (1, *size, heads, 4), generator=g).float()
        return x.to(device_of(backend))

    q, k = whole(4), whole(2)
    _, graph = tm.bilevel_routing_attention(
        q, k, k, region_size=region, topk=topk, return_graph=True, backend=backend
    )

    def means(x):
        blocks = [
            x[0, y : y + region[0], z : z + region[1]].double().mean((0, 1))
            for y in range(0, size[0], region[0])
            for z in range(0, size[1], region[1])
        ]
        return torch.stack(blocks).cpu()

    affinity = means(q).flatten(1) @ means(k).repeat_interleave(2, 1).flatten(1).T
    for row, found in zip(affinity.tolist(), graph[0, 0].tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda s: (-row[s], s))[:topk]
        assert found == sorted(best)


@each_backend
def test_regions_without_an_order_are_not_chosen(backend):
    q, k, v = maps(backend, (6, 6), b=1, hk=4)
    k[0, :2, :2] = NAN
    out, graph = tm.bilevel_routing_attention(
        q, k, v, regions=3, topk=9, return_graph=True, backend=backend
    )
    assert graph.tolist() == [[[[*range(1, 9), -1]] * 9]]
    assert out.isfinite().all()


# --- what must not be read, and what must be written --------------------------------------------


@each_kernel
def test_regions_that_nobody_lists_are_not_read(backend):
    leaves = leaves_of(maps(backend))
    graph = torch.tensor([1, 2, 6, 8]).int().repeat(2, 1, 9, 1).to(leaves[0].device)
    graph[:, :, 3] = -1  # a region that attends to nothing

    def run(tensors):
        found = tm.bilevel_routing_attention(
            *tensors, regions=3, region_graph=graph, return_lse=True, backend=backend
        )
        return *found, *gradients(found, tensors)

    want = run(leaves)
    for t in leaves[1:]:
        with torch.no_grad():
            t[:, :5, :4] = NAN  # region 0
            t[:, 5:10, 4:8] = NAN  # region 4
    got = run(leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    out, lse, dq, dk, dv = got
    for t in (out[:, 5:10, :4], dq[:, 5:10, :4], dk[:, :5, :4], dv[:, 5:10, 4:8]):
        assert (t == 0).all()
    assert (lse[:, :, 5:10, :4] == -torch.inf).all()


@each_backend
def test_lines_of_a_larger_map(backend):
    """Crops of maps with longer lines, leading channels, and flips."""
    q, k, v = maps(backend)
    o = {"regions": (4, 3), "topk": 5, "backend": backend}
    want = tm.bilevel_routing_attention(q, k, v, **o)

    def spread(t, dims):
        wide = t.new_full([n + 3 for n in t.shape], NAN)
        wide = wide.permute(dims).contiguous().permute([dims.index(i) for i in range(5)])
        inner = wide[tuple(slice(2, 2 + n) for n in t.shape)]
        return inner.copy_(t)

    strided = (spread(q, [0, 3, 1, 2, 4]), spread(k, [2, 0, 1, 3, 4]), spread(v, [0, 1, 2, 3, 4]))
    assert_same(tm.bilevel_routing_attention(*strided, **o), want, backend)
