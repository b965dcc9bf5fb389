"""bench --counters: its arithmetic on made-up counters, its peers' data, and one real row."""

from __future__ import annotations

import json

import pytest

import tokenmill as tm
from tokenmill.bench import counters

built = pytest.mark.skipif(
    not tm.library.emulated_built(),
    reason="a development build alone has the PTX machine (TOKENMILL_PTXVM=1)",
)


def launch(**changes):
    kinds = ("special", "fp32", "integer", "select", "convert")
    return {
        "mma": 0,
        "instructions_without_moves": 0,
        "classes": {kind: {"lanes": 0} for kind in kinds},
        "shared": {},
        "global": {},
    } | changes


@pytest.mark.parametrize(
    "unit, changes",
    [
        ("tensor", {"mma": 8}),
        ("shared", {"shared": {"load": {"waves": 5}, "store": {"waves": 3}}}),
        ("issue", {"instructions_without_moves": 32}),
        ("l2", {"global": {"load": {"sectors": 12}, "store": {"sectors": 4}}}),
    ],
)
def test_units_of_a_row(unit, changes):
    got = counters.cycles([launch(), launch(**changes)], scores=2000)
    assert got == {name: 4.0 if name == unit else 0.0 for name in counters.UNITS}


@pytest.mark.parametrize(
    "kind, unit, per_cycle",
    [("special", "special", 16), ("fp32", "fp32", 128)]
    + [(kind, "alu", 64) for kind in ("integer", "select", "convert")],
)
def test_lanes_of_a_row(kind, unit, per_cycle):
    some = launch()
    some["classes"][kind]["lanes"] = 3 * per_cycle
    assert counters.cycles([some], scores=1000)[unit] == 3.0


def test_least_work_of_a_shape():
    full = counters.Shape(False, 64, 512, 2, 1, False)
    assert full.scores == 2 * 512 * 512
    # two products of S x S x D, 4096 multiplications and additions an instruction
    assert full.least_mma == 2 * 2 * 512 * 512 * 64 * 2 / 4096
    assert full.least_bytes("sigmoid") == (2 * 2 + 2) * 512 * 64 * 2
    assert full.least_bytes("softmax") - full.least_bytes("sigmoid") == 2 * 512 * 4
    causal = counters.Shape(True, 64, 3, 1, 1, True)
    assert causal.scores == 6 and causal.least_mma == 5 * 6 * 64 * 2 / 4096


@pytest.mark.parametrize("variant", counters.VARIANTS, ids=lambda v: v.title)
def test_every_row_has_peers(variant):
    for shape in counters.shapes():
        assert min(counters.bounds(shape, variant).values()) > 0


@built
def test_a_row_says_what_the_kernel_did(capsys, tmp_path):
    from tokenmill.__main__ import main

    target = tmp_path / "counters.json"
    title = "forward D64 S512 causal"
    wanted = ["--filter", f"^{title} softmax", "--json", str(target)]
    assert main(["bench", "--counters", "attention", *wanted]) == 0
    (row,) = json.loads(target.read_text())["rows"]
    assert row["case"] == title and row["variant"] == "softmax"
    assert title in capsys.readouterr().out
    # no kernel does less than the least, and ours neither spills nor meets conflicts of banks
    assert 1 <= row["mma_over_least"] < 1.2 and 1 <= row["traffic_over_least"] < 4
    assert row["waves_over_ideal"] == 1 and row["local_requests"] == 0
    assert row["binding_cycles"] == max(c for u, c in row["cycles"].items() if u != "l2")
