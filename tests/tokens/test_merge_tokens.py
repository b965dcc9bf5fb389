"""merge_tokens and unmerge_tokens: conservation, inverses, gradients, and requirements of ToMe."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

EVERY = backends("reference")


def draw(seed, batch=2, tokens=13, channels=9, rows=5, dropped=True):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=g)
    assign = torch.randint(-1 if dropped else 0, rows, (batch, tokens), generator=g)
    return x, assign.int(), torch.rand(batch, tokens, generator=g) + 0.5


@pytest.mark.parametrize("backend", EVERY)
@examples(20)
@given(seed=st.integers(0, 2**20), tokens=st.integers(0, 40), rows=st.integers(1, 9))
def test_mass_and_weights_are_conserved(seed, tokens, rows, backend):
    x, assign, weight = (t.to(device_of(backend)) for t in draw(seed, 2, tokens, 5, rows))
    y, total = tm.merge_tokens(x, assign, rows, weight=weight, backend=backend)
    kept = torch.where(assign >= 0, weight, 0)
    torch.testing.assert_close(total.sum(1), kept.sum(1))
    mass = (kept[..., None] * x).sum(1)
    torch.testing.assert_close((total[..., None] * y).sum(1), mass, rtol=1e-4, atol=1e-4)
    ones, count = tm.merge_tokens(torch.ones_like(x), assign, rows, backend=backend)
    assert torch.equal(ones, (count > 0).float()[..., None].expand_as(ones))
    assert torch.equal(count.sum(1), (assign >= 0).sum(1).float())


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin", "first", "last"])
def test_against_a_loop_over_tokens(reduce, backend):
    x, assign, _ = draw(3)
    y, total = tm.merge_tokens(
        x.to(device_of(backend)), assign.to(device_of(backend)), 5, reduce=reduce, backend=backend
    )
    literal = {
        "sum": lambda r: r.sum(0), "mean": lambda r: r.mean(0), "amax": lambda r: r.amax(0),
        "amin": lambda r: r.amin(0), "first": lambda r: r[0], "last": lambda r: r[-1],
    }[reduce]  # fmt: skip
    for b in range(2):
        for t in range(5):
            members = x[b][assign[b] == t]
            want = literal(members) if len(members) else torch.zeros(9)
            torch.testing.assert_close(y[b, t].cpu(), want)
            assert total[b, t] == len(members)


@pytest.mark.parametrize("backend", EVERY)
def test_unmerging_undoes_a_merge_of_equal_tokens(backend):
    x, assign, _ = (t.to(device_of(backend)) for t in draw(1, dropped=False))
    y, _ = tm.merge_tokens(x, assign, 5, backend=backend)
    spread = tm.unmerge_tokens(y, assign, backend=backend)
    again, _ = tm.merge_tokens(spread, assign, 5, backend=backend)
    torch.testing.assert_close(tm.unmerge_tokens(again, assign, backend=backend), spread)
    order = torch.randperm(13, device=x.device).expand(2, -1).contiguous()
    permuted, size = tm.merge_tokens(x, order, 13, backend=backend)
    assert torch.equal(tm.unmerge_tokens(permuted, order, backend=backend), x)
    assert torch.equal(size, torch.ones_like(size))


@pytest.mark.parametrize("backend", EVERY)
def test_gradients_of_merge_and_unmerge_are_those_of_matrices(backend):
    device = device_of(backend)
    x, assign, weight = (t.to(device) for t in draw(5))
    x.requires_grad_(), weight.requires_grad_()
    y, total = tm.merge_tokens(x, assign, 5, weight=weight, backend=backend)
    out = tm.unmerge_tokens(y, assign, backend=backend)
    cotangent, of_total = torch.randn_like(out), torch.randn_like(total)
    got = torch.autograd.grad((out * cotangent).sum() + (total * of_total).sum(), (x, weight))
    member = (assign[:, None] == torch.arange(5, device=device)[:, None]).float()
    sums = (member * weight[:, None]).sum(2)
    rows = (member * weight[:, None]) @ x / sums.clamp(min=1e-9)[..., None]
    dense = member.transpose(1, 2) @ rows
    want = torch.autograd.grad((dense * cotangent).sum() + (sums * of_total).sum(), (x, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", EVERY)
def test_log_sizes_make_attention_to_merged_duplicates_exact(backend):
    """ToMe's proportional attention: a key that stands for s equal keys has log s added to its
    logit."""
    device = device_of(backend)
    g = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 4, 2, 16, generator=g).to(device) for _ in range(2))
    copies = torch.tensor([[0, 1, 1, 2, 2, 2, 3]], device=device)
    q = torch.randn(1, 5, 2, 16, generator=g).to(device)
    many = [t[:, copies[0]] for t in (keys, values)]
    merged, size = tm.merge_tokens(
        torch.cat([t.flatten(2) for t in many], 2), copies, 4, backend=backend
    )
    k, v = (t.unflatten(2, (2, 16)) for t in merged.chunk(2, 2))
    got = tm.attention(q, k, v, bias=size.log()[:, None, None], backend=backend)
    torch.testing.assert_close(got, tm.attention(q, *many, backend=backend))


def test_packed_rows_and_wide_assignments():
    x, assign, weight = draw(7)
    got = tm.merge_tokens(x[0], assign[0].long(), 5, weight=weight[0])
    want = tm.merge_tokens(x, assign, 5, weight=weight)
    assert torch.equal(got[0], want[0][0])
    assert torch.equal(got[1], want[1][0])


def test_compiles_as_one_graph():
    x, assign, _ = draw(2)

    def both(x):
        y, _ = tm.merge_tokens(x, assign, 5)
        return tm.unmerge_tokens(y, assign)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), both(x))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"num_out": -1}, "num_out: must be 0 to 2^30 - 1; got -1"),
        ({"num_out": 2.0}, "num_out: must be an integer; got 2"),
        ({"assign": torch.zeros(2, 12, dtype=torch.int32)}, "assign: must have shape [2, 13]"),
        ({"assign": torch.zeros(2, 13)}, "assign: must be int32 or int64; got float32"),
        ({"num_out": 4}, "assign: must be -1 to 3; got 4"),
        ({"x": torch.zeros(2, 9, 13).mT}, "x: must have a contiguous last dimension; strides"),
        ({"weight": torch.zeros(2, 12)}, "weight: must have shape [2, 13]; got [2, 12]"),
        ({"weight": torch.zeros(13, 2).T}, "weight: must have a contiguous last dimension"),
    ],
)
def test_bad_calls_are_refused(edit, message):
    x, assign, _ = draw(0)
    assign[0, 0] = 4
    arguments = {"x": x, "assign": assign, "num_out": 5, **edit}
    with pytest.raises(tm.InputError) as error:
        tm.merge_tokens(**arguments)
    assert str(error.value).startswith(f"tokenmill.merge_tokens: {message}")
