"""The table of docs/numerics.md on the bits of a request: what it promises holds, what it does not
promise differs."""

from __future__ import annotations

import pytest
import torch
from conftest import backends
from hypothesis import given
from hypothesis import strategies as st
from tier import examples
from torch._subclasses import FakeTensorMode

import tokenmill as tm
from tokenmill import registry
from tokenmill.__main__ import main
from tokenmill._promise import rows, table

PROMISE = table.promise()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif("cpu" not in backends(), reason="the promise is of the CPU kernels")

draws = st.builds(
    table.Draw,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    lengths=st.tuples(st.just(9), st.just(257), st.integers(1, 300)),
)


@pytest.mark.parametrize("op", PROMISE)
@given(draw=draws)
@examples(2)
def test_what_is_promised_holds(op, draw):
    assert not table.differences(PROMISE[op], draw)


@pytest.mark.parametrize(
    ("op", "column"), [(op, c) for op, row in PROMISE.items() for c in row if row[c].breaks]
)
def test_what_is_not_promised_differs(op, column):
    """Otherwise the table may say "always"."""
    with pytest.raises(AssertionError):
        PROMISE[op][column].breaks(table.Draw())


def test_every_operator_is_cut_into_requests():
    """Else "always" would be said of nothing."""
    for op, spec in registry.ops().items():
        if op in ("mask_partition", "kv_cache_append"):  # runs of the test kit try these
            continue
        axis = "r" if op == "topk_select" else "b"
        counts = [rows.Parts(op, s, axis, torch.float32, 0).count for s in spec.samples]
        assert max(counts) > 1, op
    assert all(cell.holds or cell.breaks for row in PROMISE.values() for cell in row.values())


@pytest.mark.parametrize("op", ["gather_tokens", "linear_attention"])
def test_a_result_that_depends_on_the_batch_or_on_strides_is_found(op, monkeypatch, capsys):
    def drift(spec, arguments, out, backend):
        first, *others = real(spec, arguments, out, backend)
        x = arguments[0]
        return first + (x.shape[0] + 2 * x.is_contiguous()) * 1e-3, *others

    real = rows.call
    monkeypatch.setattr(rows, "call", drift)
    words = ["check", "--invariance", op, "--dtype", "float32"]
    assert main(words) == 1
    found = capsys.readouterr().out
    assert found.splitlines()[1].split()[:4] == ["cpu", op, "DIFFERS", "DIFFERS"]
    assert (
        "    batch: float32: AssertionError: sample '" in found
        and "with other strides: result 0[0" in found
    )
    monkeypatch.undo()
    assert main(words) == 0
    assert "DIFFERS" not in capsys.readouterr().out


@pytest.mark.parametrize("cached", [False, True])
def test_gpus_refuse_an_invariant_call(cached):
    def call(device, backend):
        q = torch.empty(1, 8, 2, 16, device=device)
        lengths = torch.full((1,), 8, dtype=torch.int32, device=device) if cached else None
        tm.attention(q, q, q, causal=True, seqlens_k=lengths, invariant=True, backend=backend)

    with pytest.raises(RuntimeError, match=r"cannot run this call: .*invariant must be"):
        call("cpu", "cuda")
    with FakeTensorMode(), pytest.raises(RuntimeError, match="invariant: must be False on a GPU"):
        call("cuda", None)


@pytest.mark.parametrize("others", [["--json", "x"], ["--verbose"], ["--backend", "reference"]])
def test_options_that_do_not_go_with_invariance_are_refused(others, capsys):
    assert main(["check", "--invariance", *others]) == 2
    rule = "--invariance: must go without --json, --verbose and backends other than cpu"
    assert rule in capsys.readouterr().err
