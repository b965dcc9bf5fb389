"""reweighted_attention against the matrix of weights."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tokenmill as tm
from tokenmill.testing import assert_accurate


def weights_of(q, k, causal):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    z = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if causal:
        seen = torch.ones_like(z[0, 0]).tril(k.shape[1] - q.shape[1])
        z = z.masked_fill(seen == 0, -torch.inf)
    return z.softmax(-1).nan_to_num()


def weigh(p, v, heads):
    return torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(heads // v.shape[2], 2))


def by_hand(q, k, v, groups, factors, causal=False, renormalize="others"):
    p = weights_of(q, k, causal)
    b, h, _, keys = p.shape
    of_head = factors if factors.dim() == 2 else factors.expand(h, -1)
    places = groups.long().expand(b, h, keys)
    f = of_head.expand(b, -1, -1).gather(2, places)[:, :, None]
    changed = p * f
    if renormalize == "all":
        changed = changed / changed.sum(-1, keepdim=True).clamp(min=1e-300)
    if renormalize == "others":
        first = torch.where((places == 0)[:, :, None], p, 0.0)
        share = first.sum(-1, keepdim=True)
        lost = ((1 - f) * p).sum(-1, keepdim=True)
        changed = changed + lost * first / share.clamp(min=1e-30)
    return weigh(changed, v, h)


def inputs(rows=19, keys=19, dtype=torch.float32, backend="cpu"):
    g = torch.Generator().manual_seed(0)
    shapes = (2, rows, 4, 16), (2, keys, 2, 16), (2, keys, 2, 8)
    tensors = (torch.randn(shape, generator=g) for shape in shapes)
    return [t.to(device_of(backend), dtype).requires_grad_() for t in tensors]


CALLS = [
    ((2, 1), (3,), False, "others"),
    ((1, 4), (4, 2), True, "others"),
    ((2, 4), (4, 3), True, "all"),
    ((1, 1), (2,), False, "none"),
]


@each_backend
@pytest.mark.parametrize(("shape", "size", "causal", "renormalize"), CALLS)
def test_results_and_gradients(backend, shape, size, causal, renormalize):
    q, k, v = inputs(backend=backend)
    g = torch.Generator().manual_seed(1)
    groups = torch.randint(size[-1], (*shape, 19), generator=g, dtype=torch.int32)
    factors = 0.1 + 0.8 * torch.rand(size, generator=g)
    factors[..., 0] = 1.0
    groups, factors = (t.to(device_of(backend)) for t in (groups, factors))
    factors.requires_grad_()
    options = {"causal": causal, "renormalize": renormalize}
    out = tm.reweighted_attention(q, k, v, groups, factors, backend=backend, **options)
    wanted = by_hand(q, k, v, groups, factors, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    leaves, weight = (q, k, v, factors), torch.randn_like(wanted)
    found = torch.autograd.grad(out, leaves, weight)
    for a, b in zip(found, torch.autograd.grad(wanted, leaves, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_keep_the_error_budget(backend, dtype):
    q, k, v = (t.detach() for t in inputs(dtype=dtype, backend=backend))
    groups = (torch.arange(19, device=q.device) % 3)[None, None]
    factors = torch.tensor([1.0, 0.25, 0.5], device=q.device)
    out = tm.reweighted_attention(q, k, v, groups, factors, causal=True, backend=backend)
    wide = by_hand(q.double(), k.double(), v.double(), groups, factors.double(), True)
    plain = by_hand(q, k, v, groups, factors.to(dtype), True)
    assert_accurate(out, wide, plain)


@examples(40)
@given(data=st.data())
def test_any_groups_in_float64(data):
    rows, keys = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    q, k, v = (t.detach().double() for t in inputs(rows, keys))
    count = data.draw(st.integers(1, 3))
    groups = torch.tensor(
        data.draw(st.lists(st.integers(0, count - 1), min_size=keys, max_size=keys)),
        dtype=torch.int64,
    )[None, None]
    values = data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=count, max_size=count))
    factors = torch.tensor([1.0, *values[1:]], dtype=torch.float64)
    options = {
        "causal": data.draw(st.booleans()),
        "renormalize": data.draw(st.sampled_from(["others", "all", "none"])),
    }
    out = tm.reweighted_attention(q, k, v, groups, factors, **options)
    wanted = by_hand(q, k, v, groups, factors, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-12)


def test_a_group_without_weight_loses_what_it_would_receive():
    q, k, v = (t.detach() for t in inputs())
    ones = torch.ones(1, 1, 19, dtype=torch.int32)
    out = tm.reweighted_attention(q, k, v, ones, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(out, 0.5 * tm.attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_factors_of_0_have_finite_gradients():
    q, k, v = inputs()
    factors = torch.tensor([1.0, 0.0], requires_grad=True)
    groups = (torch.arange(19) % 2)[None, None].int()
    out = tm.reweighted_attention(q, k, v, groups, factors)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v, factors)))


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"groups": torch.full((1, 1, 19), 2)}, "groups: must be 0 to 1, .*; got 2"),
        ({"groups": torch.full((1, 1, 19), -1)}, "groups: must be 0 to 1, .*; got -1"),
        ({"groups": torch.zeros(3, 1, 19).int()}, "groups: must have shape .*; got"),
        ({"groups": torch.zeros(1, 1, 18).int()}, "groups: must have 19 columns.*; got 18"),
        ({"groups": torch.zeros(1, 1, 19)}, "groups: must be int32 or int64; got float32"),
        ({"factors": torch.tensor([1.0, -0.5])}, "factors: must be finite and not negative; got"),
        ({"factors": torch.tensor([1.0, torch.nan])}, "factors: must be finite and not negative"),
        ({"factors": torch.tensor([1.0, 2.0])}, "factors: must be at most 1 .*; got 2"),
        ({"factors": torch.tensor([0.5, 0.5])}, "factors: must be 1 for group 0 .*; got 0.5"),
        ({"factors": torch.zeros(3, 2)}, "factors: must have shape .*; got"),
        ({"renormalize": "some"}, "renormalize: must be 'others', 'all' or 'none'; got 'some'"),
    ],
)
def test_bad_input(edits, says):
    q, k, v = inputs()
    given = {"groups": torch.zeros(1, 1, 19).int(), "factors": torch.tensor([1.0, 0.5]), **edits}
    with pytest.raises(RuntimeError, match=f"^tokenmill.reweighted_attention: {says}"):
        tm.reweighted_attention(q, k, v, **given)


class Largest(TorchDispatchMode):
    """Records the maximum number of elements of a result."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


S, SINKS = 160, torch.arange(160)[None] % 7 == 0
COMPOSED = {
    "reweighted": lambda *qkv: tm.reweighted_attention(
        *qkv, SINKS[None].int(), torch.tensor([1.0, 0.4]), causal=True
    ),
    "sink_calibrated": lambda *qkv: tm.sink_calibrated_attention(*qkv, heads=[0, 2]),
    "redistributed": lambda *qkv: tm.redistributed_attention(*qkv, (10, 90), sinks=SINKS),
    "amplified": lambda *qkv: tm.amplified_attention(*qkv, SINKS[None].float(), causal=True),
}


@pytest.mark.parametrize("call", COMPOSED.values(), ids=COMPOSED)
def test_the_matrix_of_weights_is_never_in_memory(call):
    q, k, v = inputs(S, S)
    with Largest() as largest:
        call(q, k, v).sum().backward()
    assert largest.elements <= q.numel()  # the matrix [2, 4, S, S] has ten times as many


def test_only_chosen_heads_pay():
    """Counts operations of a call: one pass, and per calibrated head the column scores and three
    more."""
    q, k, v = (t.detach() for t in inputs(S, S))
    counts = []
    for heads in ([], [1], [0, 1, 2, 3]):
        with FlopCounterMode(display=False) as counter:
            tm.sink_calibrated_attention(q, k, v, heads=heads)
        counts.append(counter.get_total_flops())
    one, few, maximum = counts
    assert few - one == (maximum - one) / 4 and one * 3 < maximum - one < one * 4
