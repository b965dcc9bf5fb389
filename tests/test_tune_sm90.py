"""Choices of `tune` for compute capability 9.0, on the PTX machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses

import fresh
import pytest
import torch
from conftest import backends
from sm90 import MODES, hopper

import tokenmill as tm
from tokenmill import _emulator, _explain, _knobs
from tokenmill._call import kernels
from tokenmill._knobs import KNOBS
from tokenmill.bench import tune

pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")

ENDS = torch.tensor([0, 70, 70, 270], dtype=torch.int32)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def inputs(sq, sk, h, hk, d=64):
    return tuple(draw(1, s, n, d, seed=i) for i, (s, n) in enumerate(((sq, h), (sk, hk), (sk, hk))))


@contextlib.contextmanager
def chosen(mode=MODES[0], **knobs):
    with hopper(mode), _knobs.override(**knobs), _emulator.counting() as launches:
        yield launches


def attend(tensors, **options):
    return tm.attention(*tensors, return_lse=True, backend="emulated", **options)


# Tiles: more than the 132 SMs, so that CTAs take several; two per head, whose order sections
# decide; tiles of packed sequences.
SHAPES = {
    "many tiles": (inputs(33, 40, 140, 70), {}, (132, 70, 140)),
    "two tiles of a head": (inputs(200, 64, 4, 2), {"causal": True}, (8, 8, 8)),
    "packed": (
        tuple(x[0] for x in inputs(270, 270, 4, 2)),
        {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "causal": True},
        (20, 20, 20),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sections_and_grids_change_no_bit(name):
    tensors, options, blocks = SHAPES[name]
    with chosen() as launches:
        wanted = attend(tensors, **options)
    assert launches[0]["grid"][0] == blocks[0]
    for section, grid in ((32, 1), (0, 2)) if name == "many tiles" else ((0, 0), (0, 2)):
        values = {"attention__sm90_section": section, "attention__sm90_grid": grid}
        with chosen(MODES[2], **values) as launches:
            found = attend(tensors, **options)
        assert launches[0]["grid"][0] == blocks[grid]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_cache_is_read_in_any_order_of_tiles():
    q, k, v = inputs(200, 64, 4, 2)
    lengths = torch.tensor([50], dtype=torch.int32)
    found = []
    for section in (32, 0):
        with chosen(attention__sm90_section=section) as launches:
            found.append(attend((q, k, v), seqlens_k=lengths))
        assert "sm90" in launches[0]["kernel"]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def attention(backend):
    return tm.attention(*inputs(40, 40, 1, 1), causal=True, backend=backend)


def decode(backend):
    q, k, v = inputs(32, 64, 1, 1)
    lengths = torch.tensor([50], dtype=torch.int32)
    options = {"causal": False, "backend": backend}
    return tm.attention_decode(q, k, v, seqlens_k=lengths, **options)


def block_sparse(backend):
    indices = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    options = {"block_q": 64, "block_k": 64, "backend": backend}
    return tm.block_sparse_attention(*inputs(64, 64, 1, 1), indices, indices[0] + 1, **options)


def linear(backend):
    return tm.linear_attention(*inputs(64, 64, 1, 1, d=128), backend=backend)


CALLS = {
    "attention": attention,
    "attention_decode": decode,
    "block_sparse_attention": block_sparse,
    "linear_attention": linear,
}


@pytest.mark.parametrize("op", CALLS)
def test_a_forward_takes_either_kernel(op):
    call = CALLS[op]
    wanted = call("reference")
    for on in (1, 0):
        with chosen(**{f"{op}__sm90": on}) as launches:
            found = call("emulated")
        assert any("sm90" in launch["kernel"] for launch in launches) == (on == 1)
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("op", ["attention", "block_sparse_attention"])
def test_a_backward_takes_either_kernel(op, monkeypatch):
    """The forward uses its sm_90a kernel in both cases."""
    leaves = [x.requires_grad_() for x in inputs(64, 64, 1, 1)]
    monkeypatch.setitem(globals(), "inputs", lambda *_, **__: leaves)
    wanted = torch.autograd.grad(CALLS[op]("reference").sum(), leaves)
    for on in (1, 0):
        with chosen(**{f"{op}__sm90_backward": on}) as launches:
            found = torch.autograd.grad(CALLS[op]("emulated").sum(), leaves)
        kernels = [launch["kernel"] for launch in launches]
        assert "forward_sm90" in kernels[0]
        assert any("sm90" in kernel for kernel in kernels[1:]) == (on == 1)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)


def test_causal_requests_take_it_from_a_number_of_tiles_on():
    q, k, v = inputs(32, 64, 64, 1)  # 64 tiles
    options = {"seqlens_k": torch.tensor([50], dtype=torch.int32)}
    wanted = tm.attention_decode(q, k, v, **options, backend="reference")
    rule = "(not kernel_sm90: q: must have 128 tiles of 64 rows; got 64; "
    options["backend"] = "emulated"
    cuts = {"attention.sm90_section": "32 (standard)", "attention.sm90_grid": "0 (standard)"}
    for tiles in (128, 64):
        with chosen(attention_decode__sm90_tiles=tiles) as launches:
            found = tm.attention_decode(q, k, v, **options)
            kernel, knobs = explained(q, k, v, **options)
        assert ("sm90" in launches[0]["kernel"]) == (rule not in kernel) == (tiles == 64)
        expected = {"attention_decode.sm90": "1 (standard)", **cuts} if tiles == 64 else {}
        tuned = {"attention_decode.sm90_tiles": f"{tiles} (tuned; standard 256)"}
        assert knobs == expected | tuned
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    with hopper():  # calls that never read the number of tiles
        assert [*explained(q, k, v, causal=False, **options)[1]] == ["attention_decode.sm90", *cuts]


def explained(*tensors, **options):
    answer = tm.explain("attention_decode", *tensors, **options)
    return answer.kernel, answer.knobs


def test_one_switch_is_for_both_kernels_of_requests():
    q, k, v = inputs(1, 64, 2, 1)
    options = {"seqlens_k": torch.tensor([50], dtype=torch.int32), "backend": "emulated"}
    with chosen() as launches:
        kernel, knobs = explained(q, k, v, **options)
        tm.attention_decode(q, k, v, **options)
    assert kernel.startswith("csrc/dense/attention_decode/kernel_sm90 ")
    assert "sm90" in launches[0]["kernel"]
    assert [*knobs] == ["attention_decode.sm90", "attention_decode.sm90_tiles"]
    with chosen(attention_decode__sm90=0) as launches:
        kernel, knobs = explained(q, k, v, **options)
        tm.attention_decode(q, k, v, **options)
    assert "(not kernel_sm90: attention_decode.sm90: must be 1; got 0)" in kernel
    assert not any("sm90" in launch["kernel"] for launch in launches)
    assert knobs == {"attention_decode.sm90": "0 (tuned; standard 1)"}


def test_explain_names_the_variant():
    q, k, v = inputs(64, 64, 1, 1)
    q.requires_grad_()
    with hopper():
        standard = tm.explain("attention", q, k, v, backend="emulated")
        assert standard.knobs == {
            "attention.sm90": "1 (standard)",
            "attention.sm90_backward": "1 (standard)",
            "attention.sm90_section": "32 (standard)",
            "attention.sm90_grid": "0 (standard)",
        }
        with _knobs.override(attention__sm90=0, attention__sm90_backward=0):
            off = tm.explain("attention", q, k, v, backend="emulated")
        with _knobs.override(attention__sm90_section=16):
            tuned = tm.explain("attention", q.detach(), k, v, backend="emulated")
        assert not tm.explain("attention", q, k, v, kind="relu", backend="emulated").knobs
    assert "kernel_sm90: attention.sm90: must be 1; got 0)" in off.kernel
    assert "kernel_backward_sm90: attention.sm90_backward: must be 1; got 0)" in off.kernel
    switches = ("attention.sm90", "attention.sm90_backward")
    assert off.knobs == dict.fromkeys(switches, "0 (tuned; standard 1)")
    assert "\n  attention.sm90_section: 16 (tuned; standard 32)\n" in str(tuned)
    assert "attention.sm90_backward" not in tuned.knobs
    assert not tm.explain("attention", q, k, v, backend="emulated").knobs  # another device


SET_BEFORE_THE_FIRST_CALL = """
import torch
import tokenmill as tm
from tokenmill import _emulator, _explain, _knobs
from tokenmill._call import library

_knobs.put("attention.sm90", 0)
assert not library.loaded_emulated()
q = torch.ones(1, 32, 1, 64).half()
with _emulator.configured("device=sm_90a"), _emulator.counting() as launches:
    print(tm.explain("attention", q, q, q, backend="emulated").kernel)
    tm.attention(q, q, q, backend="emulated")
print("runs", *(launch["kernel"] for launch in launches))
"""


def test_the_machine_begins_with_the_values_in_force(tmp_path):
    (tmp_path / "script.py").write_text(SET_BEFORE_THE_FIRST_CALL)
    explained, ran = fresh.run_script(tmp_path / "script.py").split("runs")
    assert "not kernel_sm90: attention.sm90: must be 1; got 0" in explained
    assert "forward" in ran and "sm90" not in ran


def test_a_card_takes_what_its_cache_has(tmp_path, monkeypatch):
    later = []
    monkeypatch.setenv(_knobs.VARIABLE, str(tmp_path / "tune.json"))
    monkeypatch.setattr(torch.cuda, "_lazy_call", later.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: "NVIDIA H100")
    entry = {"knobs": {"attention.sm90_grid": 2}}
    _knobs.write(_knobs.path(), "NVIDIA H100", "attention", entry)
    _knobs.load()
    later[0]()
    try:
        with hopper(), _emulator.counting() as launches:
            attend(inputs(33, 8, 140, 140))
    finally:
        _knobs.put("attention.sm90_grid", 0)
    assert launches[0]["grid"][0] == 140


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_they_are_tuned_on_cards_that_have_the_kernels(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(_explain, "kernels", lambda *_: "yes")
    knobs = [k for k in KNOBS.values() if k.switch]
    assert [k for k in knobs if tune._usable(k, "cuda")] == (knobs if capability[0] == 9 else [])
    assert not any(tune._usable(k, "cpu") for k in knobs)

    def table(*call):
        return [dataclasses.replace(row, built=False) for row in kernels.table(*call)]

    monkeypatch.setattr(_explain, "table", table)
    assert not any(tune._usable(k, "cuda") for k in knobs)


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("attention.sm90_section", "attention.sm90"),
        ("attention.sm90_grid", "attention.sm90"),
        ("attention_decode.sm90_tiles", "attention_decode.sm90"),
        ("attention.sm90", None),
    ],
)
def test_what_cuts_a_kernel_that_is_turned_off_is_not_tried(name, off, monkeypatch):
    done = []
    monkeypatch.setattr(tune, "_measure", lambda *_: {KNOBS[name].standard: [1.0]})
    clock = tune.Clock(argparse.Namespace(time_budget=60.0), 0.0)
    with _knobs.override(attention__sm90=0, attention_decode__sm90=0):
        found = tune._tune_knob(KNOBS[name], 7, [None], clock, lambda **_: done.append(1))
    if off:
        assert (found.best, found.ratios, found.note, done) == (7, (), f"{off} is 0", [1])
    else:
        assert found.ratios == (1.0,)
