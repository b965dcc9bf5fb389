"""bench --counters: its arithmetic on synthetic counters, its peers' data, and real rows of each
operator."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import tokenmill as tm
from tokenmill.__main__ import main
from tokenmill.bench import counters
from tokenmill.bench.counters import attention, case, decode, launches, linear, select

LAUNCHES = Path(__file__).parent.parent / "bench/results/ptx-launches.json"
built = pytest.mark.skipif(
    not tm._call.library.emulated_built(),
    reason="only a development build has the PTX machine (TOKENMILL_PTXVM=1)",
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
        ("shared", {"wgmma": {"a_bytes": 256, "b_bytes": 768}}),
        ("issue", {"instructions_without_moves": 32}),
        ("l2", {"global": {"load": {"sectors": 12}, "store": {"sectors": 4}}}),
    ],
)
def test_units_of_a_row(unit, changes):
    got = case.cycles([launch(), launch(**changes)], units=2)
    assert got == {name: 4.0 if name == unit else 0.0 for name in case.UNITS}


@pytest.mark.parametrize(
    "kind, unit, per_cycle",
    [("special", "special", 16), ("fp32", "fp32", 128)]
    + [(kind, "alu", 64) for kind in ("integer", "select", "convert")],
)
def test_lanes_of_a_row(kind, unit, per_cycle):
    some = launch()
    some["classes"][kind]["lanes"] = 3 * per_cycle
    assert case.cycles([some], units=1)[unit] == 3.0


def test_least_work_of_a_shape():
    full = attention.Shape(False, 64, 512, 2, 1, False)
    assert full.scores == 2 * 512 * 512
    # two products of S x S x D, 4096 multiplications and additions per instruction
    assert full.min_mma == 2 * 2 * 512 * 512 * 64 * 2 / 4096
    assert full.min_bytes("sigmoid") == (2 * 2 + 2) * 512 * 64 * 2
    assert full.min_bytes("softmax") - full.min_bytes("sigmoid") == 2 * 512 * 4
    causal = attention.Shape(True, 64, 3, 1, 1, True)
    assert causal.scores == 6 and causal.min_mma == 5 * 6 * 64 * 2 / 4096


@pytest.mark.parametrize(
    "variant", [v for v in attention.VARIANTS if v.has_peers], ids=lambda v: v.title
)
def test_every_row_has_peers(variant):
    for shape in attention.shapes():
        assert min(attention.bounds(shape, variant).values()) > 0


def test_least_work_of_linear_attention():
    shape = linear.Shape(64)
    # per token: pairs within chunks of 64 (32.5 on average) twice, and the state twice
    macs = 1024 * 2 * (2 * 32.5 * 64 + 2 * 64 * 64)
    assert shape.min_mma == macs * 2 / 4096
    assert shape.min_bytes == 4 * 1024 * 2 * 64 * 2
    backward = linear.Shape(64, backward=True, gates="tokens")
    assert backward.min_mma == 2.5 * shape.min_mma
    assert backward.min_bytes == 7 * 1024 * 2 * 64 * 2 + 2 * 1024 * 2 * 4


def test_peers_of_linear_attention():
    """Two kernels of flash-linear-attention count as one; each figure is the best of all."""
    bounds = linear.bounds(64)
    assert bounds["instructions"] == pytest.approx(4 * (5.39 + 11.77))
    assert bounds["traffic_over_least"] == 1.5  # from lightning-attention
    assert round(bounds["mma_over_least"], 2) == 1.33
    assert bounds["binding_cycles"] == pytest.approx(6.25 + 14.16)
    assert not linear.bounds(256)


def test_peers_of_topk_select():
    bounds = select.topk_bounds()
    assert bounds["instructions"] == pytest.approx(449.7, abs=0.05)
    assert bounds["traffic_over_least"] == pytest.approx(11.4, abs=0.05)


def test_rows_that_lists_name():
    lists = torch.tensor([[0, 2, 5, -1], [1, 2, 3, 4]], dtype=torch.int32)
    counts = torch.tensor([3, 4])
    # blocks of 2 of 11 keys, the first and the last two: 0 1 4 5 9 10, and 0 2..10
    assert decode.listed_rows(lists, counts, 2, 11, 1, 2) == 6 + 10
    assert decode.listed_rows(lists[:1], counts[:1], 1, 11, 0, 0) == 3


def test_titles_are_names():
    for counted in counters.OPS.values():
        titles = [c.title for c in counted.cases()]
        assert len(titles) == len(set(titles))
        assert max(map(len, titles)) < counters.CASE_WIDTH


def test_unknown_operators_are_named(monkeypatch, capsys):
    monkeypatch.setattr(tm._call.library, "emulated_built", lambda: True)
    monkeypatch.delitem(counters.OPS, "gather_tokens")
    assert main(["bench", "--counters", "gather_tokens"]) == 2
    assert "got gather_tokens" in capsys.readouterr().err
    assert main(["bench", "--counters", "--filter", "no such case"]) == 2
    assert "no case matches; got 'no such case'" in capsys.readouterr().err


def rows_of(pattern, ops, tmp_path):
    target = tmp_path / "counters.json"
    wanted = ["--filter", pattern, "--json", str(target)]
    assert main(["bench", "--counters", *ops, *wanted]) == 0
    return json.loads(target.read_text())["rows"]


@built
@pytest.mark.parametrize("device", ["", "sm_90a "])
def test_a_row_says_what_the_kernel_did(device, capsys, tmp_path):
    title = f"{device}forward D64 S512 causal softmax"
    (row,) = rows_of(f"^{title}$", ["attention"], tmp_path)
    assert row["case"] == title and row["op"] == "attention"
    assert title in capsys.readouterr().out
    # no kernel does less than the minimum, and ours neither spill nor have bank conflicts
    assert 1 <= row["mma_over_least"] < 1.2 and 1 <= row["traffic_over_least"] < 4
    assert row["waves_over_ideal"] == 1 and row["local_requests"] == 0
    assert row["binding_cycles"] == max(c for u, c in row["cycles"].items() if u != "l2")


# Pattern of one case per operator, and limits of its figures.
ROWS = {
    "attention_decode": ("^bfloat16, keys 2000, 300, stream_k", {"traffic_over_least": 1.1}),
    "kv_block_scores": ("^maxima of 64 of 8192 tokens", {"traffic_over_least": 1.05}),
    "indexer_topk_select": ("^a step over 131072 keys", {"traffic_over_least": 1.13}),
    "additive_attention": ("^forward 768", {"traffic_over_least": 1.5, "instructions": 700}),
    "landmark_attention": (
        "^forward .* blocks of 64, float16$",
        {"mma_over_least": 1.07, "traffic_over_least": 5.5},
    ),
    "linear_attention": (
        "^forward D64 S1024 H2, decay",
        {"traffic_over_least": 1.8, "mma_over_least": 3.32 / 2},
    ),
    "titans_memory": ("^forward .* of 64, float16$", {"traffic_over_least": 1.85, "waves": 1080}),
    "attention_column_scores": ("lse given", {"traffic_over_least": 2.9, "mma_over_least": 1.07}),
    "attention_row_scores": ("", {"traffic_over_least": 1.4}),
    "block_pool_keys": ("^mean", {"traffic_over_least": 1.05}),
    "block_pool_keys_update": ("", {"traffic_over_least": 1.1}),
    "causal_conv1d": ("^forward", {"traffic_over_least": 3.1}),  # the filter of each 16 tokens
    "causal_conv1d_decode": ("", {"traffic_over_least": 1.8}),
    "delta_attention": (
        "^forward .* head, bfloat16$",
        {"traffic_over_least": 6.1, "mma_over_least": 6.7},
    ),
    "delta_attention_decode": ("", {"traffic_over_least": 1.1}),
    "kv_cache_append": ("tokens$", {"traffic_over_least": 1.1}),
    "kv_cache_compact": ("", {"traffic_over_least": 1.1}),
    "linear_attention_decode": ("", {"traffic_over_least": 1.05}),
    "merge_attention_states": ("", {"traffic_over_least": 1.4}),
    "query_similarity_gate": ("", {"traffic_over_least": 1.05}),
    "transpose_block_list": ("", {"traffic_over_least": 14}),
    "sparse_decode_attention": ("^tokens$", {"traffic_over_least": 1.9}),  # sums of 19 parts
    "topk_select": ("^normal 1 x 65536, k=512", {"traffic_over_least": 2.7, "instructions": 400}),
    "bilevel_routing_attention": ("8 x 8, 4 each, float16$", {"traffic_over_least": 1.05}),
    "block_sparse_attention": ("blocks of 2, float16$", {"traffic_over_least": 1.05}),
    "hip_block_select": ("^512 queries, float16$", {"traffic_over_least": 1.05}),
    "best_match": ("", {"traffic_over_least": 6.6}),
    "cluster_tokens": ("", {"traffic_over_least": 61}),  # a window of clusters per cell
    "gather_fuse": ("kept$", {"traffic_over_least": 1.1}),
    "gather_tokens": ("", {"traffic_over_least": 1.1}),
    "local_pool": ("^mean", {"traffic_over_least": 5.3}),  # a window through L1
    "mask_partition": ("1024", {"traffic_over_least": 2}),
    "reconstruct_tokens": ("", {"traffic_over_least": 6}),
    "scatter_tokens": ("", {"traffic_over_least": 1.1}),
    "segment_reduce": ("^sum", {"traffic_over_least": 1.7}),
    "topk_partition": ("", {"traffic_over_least": 3.1}),
}
# Sums over few lanes, and histograms, have bank conflicts.
WAVES = {
    "bilevel_routing_attention": 1.02, "cluster_tokens": 1.1, "delta_attention": 1.45,
    "gather_fuse": 3.3, "hip_block_select": 1.1, "indexer_topk_select": 1.02,
    "linear_attention_decode": 1.6, "reconstruct_tokens": 1.1, "topk_partition": 1.7,
    "topk_select": 1.5,
}  # fmt: skip
# Operators whose products run on tensor cores.
PRODUCTS = {
    "attention_column_scores", "attention_decode", "best_match", "bilevel_routing_attention",
    "block_sparse_attention", "delta_attention", "hip_block_select", "indexer_topk_select",
    "kv_block_scores", "landmark_attention", "linear_attention", "sparse_decode_attention",
}  # fmt: skip


@built
def test_every_operator_with_a_cuda_kernel_has_cases():
    kernels = {name for name, spec in tm.registry.ops().items() if spec.forward.has_emulated()}
    assert kernels == set(counters.OPS)
    assert kernels == {*ROWS, "attention"}
    assert kernels == set(launches.CALLS)


@built
@pytest.mark.skipif(not LAUNCHES.exists(), reason="the results are not beside the tests")
def test_the_table_of_launches_has_every_call():
    counted = [(row["op"], row["case"]) for row in json.loads(LAUNCHES.read_text())["rows"]]
    assert counted == [(op, title) for op, calls in launches.CALLS.items() for title in calls]


@built
def test_launches_of_a_request(capsys, tmp_path):
    target = tmp_path / "launches.json"
    assert main(["bench", "--launches", "kv_cache_compact", "--json", str(target)]) == 0
    (row,) = json.loads(target.read_text())["rows"]
    assert row["op"] == "kv_cache_compact" and row["blocks"] == [1, 64, 64]
    assert "1, 64, 64" in capsys.readouterr().out


@built
@pytest.mark.parametrize("op", ROWS)
def test_rows_of_each_operator(op, capsys, tmp_path):
    pattern, maximum = ROWS[op]
    (row,) = rows_of(pattern, [op], tmp_path)
    assert row["op"] == op and re.search(pattern, row["case"])
    out = capsys.readouterr().out
    assert not re.findall(rf"^(?!{op},)\w+, per ", out, flags=re.MULTILINE)
    for key, bound in maximum.items():
        assert row[key] <= bound, key
    assert row["traffic_over_least"] >= 1
    if op != "mask_partition":  # ptxas keeps a warp's bits in registers there
        assert row["local_requests"] == 0
    assert row["waves_over_ideal"] <= WAVES.get(op, 1.01)
    assert row["mma_over_least"] >= 1 if op in PRODUCTS else row["mma_over_least"] == 0


@built
def test_gradients_are_counted_apart(tmp_path):
    """A backward row has only the kernels of the backward, and no peers."""
    (row,) = rows_of("^backward D64 S1024 H2, decay", ["linear_attention"], tmp_path)
    assert row["against"] == {} and 1 <= row["mma_over_least"] < 2


@built
def test_work_of_lists(tmp_path):
    """Tensor cores multiply only what lists name; heads of 32 are padded to 64."""
    minimum = {"block_sparse_attention": 1, "hip_block_select": 1, "bilevel_routing_attention": 2}
    rows = rows_of("^(256|512 queries|16 regions of 8).*, float16$", list(minimum), tmp_path)
    assert {row["op"] for row in rows} == set(minimum)
    for row in rows:
        backward = "backward" in row["case"]
        assert row["mma_over_least"] == pytest.approx(minimum[row["op"]] * (1.4 if backward else 1))
        exponentials = 16 * row["cycles"]["special"] / 1000  # per score
        assert exponentials <= {"hip_block_select": 0}.get(row["op"], 2 if backward else 1.1)
