"""DTensors: an operator gives the same results on shards as on whole tensors, and reports its
splits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tier import FULL

from tokenmill import registry
from tokenmill._call.spec import AXES, Sharding

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from tokenmill.distributed import _parts

HERE = Path(__file__).resolve().parent
SCENARIOS = [
    "rules_come_with_the_first_call",
    "tensor_parallel_attention",
    "tensor_parallel_linear_attention",
    "compiled_tensor_parallel",
    "compiled_for_any_length",
    "fully_sharded",
    "fully_sharded_and_tensor_parallel",
    "shared_key_heads",
    "uneven_shards",
    "masks_of_requests",
    "cotangents_come_as_they_are",
    "written_arguments",
    "refusals",
    "replicated_calls",
    "reference_in_float64",
    "autocast",
]
OWED = """an operator owes OpSpec.sharding: a Sharding with the labels of its arguments and results,
or a text that says why its calls do not fall apart (tokenmill.registry, docs/sharding.md)"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """(outcomes of calls, failed scenarios) of each of four ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", str(HERE / "shard_calls.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TOKENMILL_BACKEND", None)
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder), *(["full"] if FULL else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        said = [rank.communicate(timeout=3600 if FULL else 900)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(said)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(4)]


each_spec = pytest.mark.parametrize("spec", registry.ops().values(), ids=list(registry.ops()))


@each_spec
def test_an_operator_says_how_its_calls_fall_apart(spec):
    assert spec.sharding, f"{spec.name}: {OWED}"
    if not isinstance(spec.sharding, Sharding):
        return
    names = {name.partition("@")[0] for name in spec.sharding.arguments}
    others = {other for name in spec.sharding.arguments for other in name.split("@")[1:]}
    assert names | others | set(spec.sharding.without) <= set(spec.forward.arguments)
    for labels in (*spec.sharding.arguments.values(), *spec.sharding.results):
        assert set(labels) <= {*AXES, *". ~"}, labels
    for op in (*spec.torch_ops, *([spec.out] if spec.out else [])):
        found = _parts.labels_of(op.name)  # labels of each result and each gradient
        for name in op.written:
            assert found.arguments[name].strip(". "), name
        if op.differentiates:
            known = {*spec.forward.arguments, *found.saved, *found.cotangents}
            rest = set(op.arguments) - known
            assert all(name.startswith("needs_") for name in rest), rest


@each_spec
def test_calls_on_shards_are_those_on_whole_tensors(spec, reports):
    if not isinstance(spec.sharding, Sharding):
        pytest.skip(f"{spec.name}: {spec.sharding}")
    outcomes = [o for calls, _ in reports for o in calls if o["op"] == spec.name]
    assert not [o for o in outcomes if o["wrong"]]
    ran = {letter for o in outcomes if not o["refused"] for letter in o["axes"]}
    assert sorted(AXES[letter] for letter in ran) == sorted(spec.sharding.axes)
    told = [[(o["call"], o["refused"]) for o in c if o["op"] == spec.name] for c, _ in reports]
    assert told[0] == told[1] and told[2] == told[3]  # the ranks of a row report the same


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario, reports):
    assert not [report for _, found in reports for report in [found[scenario]] if report]


def test_no_scenario_is_forgotten(reports):
    assert all(list(found) == SCENARIOS for _, found in reports)


def test_importing_the_package_leaves_torch_distributed_alone():
    code = "import sys, tokenmill; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_has_the_table_of_the_registry():
    page = HERE.parents[1] / "docs" / "sharding.md"
    if not page.exists():
        pytest.skip("the documents are not beside the tests")
    rows = [f"| {s.name} | {s.splits_along} |" for s in registry.ops().values()]
    lines = page.read_text().splitlines()
    start = lines.index("| --- | --- |") + 1
    found = lines[start : start + len(rows)]
    assert found == rows, "\n".join(["docs/sharding.md should read:", *rows])
    assert lines[start + len(rows)] == ""
