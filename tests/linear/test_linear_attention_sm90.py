"""The sm_90a forward of linear attention on the PTX machine."""

from __future__ import annotations

import pytest
import torch
from conftest import backends
from sm90 import check_every_order, check_explained, hopper

import tokenmill as tm
from tokenmill import _emulator, registry
from tokenmill.reference.linear import linear_attention as reference

pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")

F16, BF16 = torch.float16, torch.bfloat16
NAN, INF = float("nan"), float("inf")
SPEC = registry.get("linear_attention")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(s, *, b=1, h=1, hk=1, d=128, dv=128, dtype=F16):
    shapes = (b, s, h, d), (b, s, hk, d), (b, s, hk, dv)
    return tuple(draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))


def gates(*shape):
    x = torch.nn.functional.logsigmoid(draw(*shape) + 3)
    x[..., 40, :] = -INF
    return x


def run(q, k, v, backend="emulated", **options):
    """Returns out and final state."""
    return tm.linear_attention(q, k, v, return_final_state=True, backend=backend, **options)


def check_results(found, q, k, v, **options):
    """Compares with float64 within the error budget."""
    wide_call = tm.testing.convert(((q, k, v), options), torch.float64)
    wide = run(*wide_call[0], backend="reference", **wide_call[1])
    record = SPEC.record(q, k, v, return_final_state=True, **options)
    plain = reference.linear_attention_quadratic(record, upcast=False)
    for name, *results in zip(("out", "state"), found, wide, plain, strict=False):
        tm.testing.assert_accurate(*results, name=name)


def check_budget(q, k, v, launches=1, **options):
    """Runs the kernel, expects `launches` launches, checks the results and returns them."""
    with hopper(), _emulator.counting() as counted:
        found = run(q, k, v, **options)
    assert sum("recurrence_sm90_kernel" in c["kernel"] for c in counted) == launches
    check_results(found, q, k, v, **options)
    return found


CASES = {
    "a chunk": ({"s": 64}, {}),
    "decay, a short chunk, a group": (
        {"s": 150, "h": 2, "dtype": BF16},
        {"log_decay": torch.tensor([-0.01, -1.0])},
    ),
    "state, no decay": (
        {"s": 65, "b": 2},
        {"initial_state": 3 * draw(2, 1, 128, 128), "log_decay": torch.zeros(1)},
    ),
    "state, bfloat16": (
        {"s": 129, "h": 2, "hk": 2, "dtype": BF16},
        {"initial_state": draw(1, 2, 128, 128), "log_decay": torch.tensor([0.0, -0.02])},
    ),
    "state, gates": (
        {"s": 100, "h": 2},
        {"initial_state": draw(1, 2, 128, 128), "log_decay": gates(1, 100, 2), "scale": 0.5},
    ),
    "everything forgotten": (
        {"s": 70, "h": 2},
        {"initial_state": draw(1, 2, 128, 128), "log_decay": torch.tensor([-INF, -30.0])},
    ),
    "wide": (
        {"s": 130, "d": 256, "dv": 256},
        {"initial_state": draw(1, 1, 256, 256), "log_decay": torch.tensor([-0.1])},
    ),
    "wide keys, bfloat16": (
        {"s": 65, "d": 256, "dtype": BF16},
        {"initial_state": draw(1, 1, 256, 128)},
    ),
    "wide values": ({"s": 33, "dv": 256}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_results_keep_the_budget(name):
    shapes, options = CASES[name]
    check_budget(*inputs(**shapes), **options)


ORDERS = {
    "": ({"s": 330}, {"log_decay": torch.tensor([-0.1]), "initial_state": draw(1, 1, 128, 128)}),
    "wide": ({"s": 200, "d": 256, "dtype": BF16}, {"log_decay": gates(1, 200, 1)}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_of_events_gives_the_same_bits(name):
    """More chunks than pipeline stages; long sequences have parts, each with its own launch."""
    shapes, options = ORDERS[name]
    q, k, v = inputs(**shapes)
    check_every_order(lambda: run(q, k, v, **options))


@pytest.mark.parametrize("decay", [torch.tensor([-0.002]), gates(1, 600, 1)], ids=["head", "gates"])
def test_parts_of_a_sequence(decay):
    """Three parts: the states of two parts, then the outputs of all."""
    state = draw(1, 1, 128, 128)
    check_budget(*inputs(600), launches=2, log_decay=decay, initial_state=state)


PACKED = [0, 70, 70, 71, 199, 290]


def test_packed_sequences():
    """Sequences end inside chunks; one is empty, one is a single token, one fills its chunks."""
    q, k, v = (x[0] for x in inputs(290, h=2, dtype=BF16))
    cu = torch.tensor(PACKED, dtype=torch.int32)
    options = {"log_decay": gates(290, 2), "initial_state": draw(5, 2, 128, 128)}
    _, state = check_budget(q, k, v, cu_seqlens=cu, launches=2, **options)
    assert torch.equal(state[1], options["initial_state"][1])


def test_packed_sequences_of_several_parts():
    """530 tokens in three parts lie between two short sequences, whose values they do not see."""
    q, k, v = (x[0] for x in inputs(640))
    cu = torch.tensor([0, 70, 600, 640], dtype=torch.int32)
    options = {"log_decay": gates(640, 1), "initial_state": draw(3, 1, 128, 128), "cu_seqlens": cu}
    out, state = check_budget(q, k, v, launches=2, **options)
    for x in (q, k, v):
        x[:70] = x[600:] = NAN
    with hopper():
        again, state_again = run(q, k, v, **options)
    assert torch.equal(out[70:600], again[70:600]) and torch.equal(state[1], state_again[1])
    assert again[:70].isnan().all() and again[600:].isnan().all()


def test_sequences_that_fill_the_device_are_not_cut():
    """A longer sequence among them is not split either."""
    lengths = torch.tensor([0] + [32] * 131 + [300])
    q, k, v = (x[0] for x in inputs(int(lengths.sum())))
    check_budget(q, k, v, cu_seqlens=lengths.cumsum(0).to(torch.int32))


def test_a_sequence_does_not_see_what_is_packed_behind_it():
    q, k, v = (x[0] for x in inputs(160))
    cu = torch.tensor([0, 100, 160], dtype=torch.int32)
    with hopper():
        out, state = run(q, k, v, cu_seqlens=cu)
        for x in (q, k, v):
            x[100:] = NAN
        again, state_again = run(q, k, v, cu_seqlens=cu)
    assert torch.equal(out[:100], again[:100]) and torch.equal(state[0], state_again[0])
    assert again[100:].isnan().all() and state_again[1].isnan().all()


def test_rows_without_a_sequence():
    q, k, v = (x[0] for x in inputs(200))
    inner = torch.tensor([0, 65, 150], dtype=torch.int32)
    with hopper():
        out, state = run(q, k, v, cu_seqlens=inner + 5)
        wanted, state_wanted = run(*(x[5:155] for x in (q, k, v)), cu_seqlens=inner)
    assert torch.equal(out[5:155], wanted) and torch.equal(state, state_wanted)
    assert (out[:5] == 0).all() and (out[155:] == 0).all()


def test_strides():
    """q, k and v in one projection; heads before tokens; out in a part of a tensor."""
    check_budget(*draw(2, 70, 3, 2, 128, dtype=F16).unbind(2))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(70, h=2, hk=2))
    wanted = check_budget(q, k, v)[0]
    whole = torch.zeros(1, 70, 3, 128, dtype=F16)
    with hopper():
        tm.linear_attention(q, k, v, out=whole[:, :, 1:], backend="emulated")
    assert torch.equal(whole[:, :, 1:], wanted) and (whole[:, :, 0] == 0).all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("d", [128, 256])
def test_a_later_token_touches_no_earlier_row(d, value):
    q, k, v = inputs(130, d=d)
    with hopper():
        clean, _ = run(q, k, v)
        k[:, 110:, :, ::3] = NAN
        v[:, 100:, :, ::3] = value
        q[:, 120] = value
        out, state = run(q, k, v)
    assert torch.equal(out[:, :100], clean[:, :100])
    assert torch.equal(out[:, 100:110, :, 1::3], clean[:, 100:110, :, 1::3])
    assert not out[:, 100:, :, ::3].isfinite().any() and not state[..., ::3].isfinite().any()


def test_values_that_are_not_finite_show_where_they_are_seen():
    """No product with them is 0, and none cancels another."""
    q, k, v = inputs(100)
    q, k = q.abs(), k.abs()
    v[:, 5, :, 7] = v[:, 70, :, 9] = INF
    v[:, 80, :, 8] = -INF
    with hopper():
        found = run(q, k, v)
    for a, b in zip(found, run(q, k, v, backend="reference"), strict=True):
        assert torch.equal(a.isinf(), b.isinf()) and torch.equal(a.isnan(), b.isnan())


def test_the_state_of_float16_exceeds_its_range():
    """Sums reach 10^6, with a wide sum of 10^-6 next to them."""
    q, k, v = inputs(200)
    scale = torch.tensor([1000.0, 1e-3]).repeat(64)
    state = draw(1, 1, 128, 128) * 1e3 * scale
    q, v = q / 1000, v * (scale / 100).half()
    check_budget(q, k, v, initial_state=state, log_decay=torch.tensor([-0.001]))


def test_results_agree_with_the_kernel_of_every_chip():
    q, k, v = inputs(130, h=2)
    options = {"log_decay": torch.tensor([-0.1, 0.0]), "initial_state": draw(1, 2, 128, 128)}
    with hopper():
        found = run(q, k, v, **options)
    for a, b in zip(found, run(q, k, v, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-2)


TAKEN = {
    "": ({"s": 32}, {}),
    "q: must be float16 or bfloat16": ({"s": 32, "dtype": torch.float32}, {}),
    "q: must have head_dim 128 or 256; got 64": ({"s": 32, "d": 64}, {}),
    "v: must have head_dim 128 or 256; got 64": ({"s": 32, "dv": 64}, {}),
    "feature_map: must be 'identity'; got relu": ({"s": 32}, {"feature_map": "relu"}),
    "normalize: must be False": ({"s": 32}, {"normalize": True}),
    "q: must have 32 tokens for each sequence; got 31": ({"s": 31}, {}),
}


def check_explanation(why, q, k, v, **options):
    """Asserts that the kernel that runs is the one that explain names."""
    found = check_explained("linear_attention", why, q, k, v, return_final_state=True, **options)
    options.pop("out", None)
    check_results(found, q, k, v, **options)


@pytest.mark.parametrize("why", TAKEN)
def test_explain_names_the_kernel_that_runs(why):
    shapes, options = TAKEN[why]
    check_explanation(why, *inputs(**shapes), **options)


def test_explain_knows_sequences_and_layouts():
    q, k, v = inputs(64, h=2, hk=2)
    for ends, why in (
        ([0, 31, 64], ""),
        ([0, 20, 30, 64], "q: must have 32 tokens for each sequence; got 64"),
    ):
        cu = torch.tensor(ends, dtype=torch.int32)
        check_explanation(why, q[0], k[0], v[0], cu_seqlens=cu)
    strides = "must have strides that are multiples of 8, of 128 or more; got (16384, 256, 0, 1)"
    check_explanation(f"k: {strides}", q, k[:, :, :1].expand(k.shape), v)
    shifted = torch.empty(q.numel() + 1, dtype=F16)[1:].view(q.shape)
    start = "must start at a multiple of 16 bytes; got 2 bytes past one"
    check_explanation(f"out: {start}", q, k, v, out=shifted)
