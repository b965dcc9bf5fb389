"""The runner of the benchmarks: intervals, time budgets, resumed runs, ceilings, timing on a
simulated GPU. No test depends on a measured time."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import threading
import time
import types

import pytest
import torch

import tokenmill as tm
from tokenmill import registry
from tokenmill.__main__ import main
from tokenmill._cli import duration
from tokenmill.bench import (
    case,
    ceilings,
    moba_attention,
    native_sparse_attention,
    page,
    primitives,
    primitives_cpu,
    results,
    run,
    timing,
)
from tokenmill.bench.case import Case
from tokenmill.bench.interval import median_interval
from tokenmill.bench.measure import Budget

MADE_UP = ceilings.Ceilings({"float32": 1e9}, ((1e3, 8e9), (1e9, 1e9)), "quick")


def test_the_interval_of_a_median_is_between_order_statistics():
    """Coverage is checked by counting every sequence of coins, and by its normal limit."""
    for n in (1, 2, 5, 6, 9, 13):
        found = median_interval([float(i) for i in range(n, 0, -1)])
        outside = sum(
            2 for coins in range(2**n) if coins.bit_count() < found.low
        )  # fewer heads than the rank of the lower end, or as few tails
        assert found.coverage == 1 - outside / 2**n or n == 1
        assert found.low + found.high == n + 1
        assert found.coverage >= 0.95 or found.low == 1
    assert median_interval([1.0]).coverage == 0
    near, far = (median_interval([*range(n)]) for n in (1000, 1001))
    assert abs(near.coverage - far.coverage) < 0.005 and far.coverage > 0.95
    assert abs(near.low - far.low) <= 1 and abs(near.high - far.high) <= 1


def test_a_budget_is_shared_by_the_cases_that_are_left():
    now = [0.0]
    budget = Budget(3.0, 100.0, 4, clock=lambda: now[0])
    assert budget.limited and budget.next() == 25
    now[0] = 10  # the first took 10 of its 25
    assert budget.next() == 30
    now[0] = 99
    assert budget.next() == 0.5
    now[0] = 101
    assert budget.next() is None
    assert Budget(3.0, None, 4).next() == 3 and not Budget(3.0, None, 4).limited


def test_times_are_read_with_units():
    texts = ("90", "90s", "1.5", "10m", "1h30m", "1m1s")
    assert [duration(text) for text in texts] == [90, 90, 1.5, 600, 5400, 61]


def test_a_limited_run_is_content_with_one_round():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = timing.interleave(runs, seconds=1e-9, limited=True, on_error=lambda *_: None)
    assert {*calls} == {"a"} and found["a"].rounds == 1  # no time was left for b
    assert timing.interleave(runs, seconds=0.0)["a"].rounds == timing.ROUNDS


def test_a_short_call_is_repeated_and_a_long_one_is_not():
    calls = collections.Counter()

    def long():
        calls["long"] += 1
        end = time.process_time() + 2 * timing.MIN_SAMPLE
        while time.process_time() < end:
            pass

    timing.interleave({"short": lambda: calls.update(["short"]), "long": long}, seconds=0.0)
    assert calls["long"] == timing.ROUNDS + 1 and calls["short"] > 10 * timing.ROUNDS


def test_a_call_waits_until_the_threads_of_the_call_before_sleep():
    work, done, seen = bytes(20_000_000), [0], []  # hashed without the interpreter's lock

    def start_a_thread():
        begun = threading.Event()

        def spin():
            begun.set()
            hashlib.sha256(work)
            done[0] += 1

        threading.Thread(target=spin).start()
        begun.wait()
        seen.append(done[0])

    def own():
        assert done[0] == len(seen)

    timing.interleave({"other": start_a_thread, "own": own}, seconds=0.0)
    assert len(seen) > timing.ROUNDS


# Resumed runs


def work():
    return sum(range(100))


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs `bench gather_tokens` on synthetic cases and ceilings; returns status and output."""
    monkeypatch.setattr(ceilings, "measured", lambda dtypes, gpu, threads: MADE_UP)
    prepared = []

    def prepare(i):
        prepared.append(i)
        if i == bench_of.broken:
            raise bench_of.error
        return work, {"good": lambda: work}

    def made(i):
        return Case(
            "gather_tokens", f"case {i}", torch.float32, 1.0, 1e6, lambda: prepare(i), length=i
        )

    def bench_of(*words):
        prepared.clear()
        status = main(["bench", "gather_tokens", "--seconds", "0", *map(str, words)])
        return types.SimpleNamespace(status=status, prepared=[*prepared], **_captured(capsys))

    bench_of.broken, bench_of.error = None, RuntimeError("no such shape")
    monkeypatch.setattr(run, "cases", lambda ops: [made(i) for i in range(3)])
    return bench_of


def _captured(capsys):
    out, err = capsys.readouterr()
    return {"out": out, "err": err}


def test_a_run_goes_on_where_it_was_cut_off(bench, tmp_path):
    target = tmp_path / "r.json"
    bench.broken, bench.error = 1, KeyboardInterrupt()
    first = bench("--json", target)
    assert first.status == 130 and f"wrote {target}" in first.out
    whole = json.loads(target.read_text())
    assert [row["length"] for row in whole["rows"]] == [0]
    bench.error = RuntimeError("no such shape")
    second = bench("--resume", target)
    assert second.status == 1 and second.prepared == [1, 2]
    assert "--resume: 1 of 3 cases are measured already" in second.out
    bench.broken = None
    copy = tmp_path / "copy.json"
    third = bench("--resume", target, "--json", copy)  # a failed row is measured again
    assert third.status == 0 and third.prepared == [1]
    rows = json.loads(copy.read_text())["rows"]
    assert [row["length"] for row in rows] == [0, 2, 1]
    assert rows[0] == whole["rows"][0]
    assert "error" in json.loads(target.read_text())["rows"][1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_run_does_not_go_on_with_what_was_measured_otherwise(bench, tmp_path):
    target = tmp_path / "r.json"
    assert bench("--resume", target).status == 0  # no earlier file: a new run
    text = target.read_text()
    for changed, words in (
        ({"build": "0"}, "build 0, now "),
        ({"schema": 1}, "schema 1, now 2"),
        ({"threads": 7}, "threads 7, now 1"),
        ({"options": {"seconds": 3.0}}, "seconds 3.0, now 0.0"),
        ({"machine": {}}, "cpu None, now "),
    ):
        target.write_text(json.dumps(json.loads(text) | changed))
        found = bench("--resume", target)
        assert found.status == 2 and words in found.err and not found.prepared
        assert "--resume: must hold results of the same build, device and options" in found.err
    target.write_text(json.dumps(json.loads(text) | {"rows": [{"op": "a", "case": "b"}]}))
    found = bench("--resume", target)
    assert found.status == 2 and "figures of a row, are missing" in found.err


@pytest.mark.parametrize("argument", ["--resume", "--primitives"])
@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (b"[]", "must be results that bench --json wrote"),
        (b"[" * 100_000, "must be results that bench --json wrote"),
        (b'{"machine": {}, "rows": [1]}', "must be results that bench --json wrote"),
        (b"\xff", "must be readable"),
    ],
    ids=["list", "depth", "row", "bytes"],
)
def test_a_damaged_file_is_named_and_left(bench, tmp_path, argument, damage, rule):
    target = tmp_path / "r.json"
    target.write_bytes(damage)
    found = bench(argument, target)
    assert found.status == 2 and f"{argument}: {rule}; got '{target}' (" in found.err
    assert target.read_bytes() == damage


def test_a_crash_while_a_row_is_written_leaves_the_rows_before(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    out = results.Results(str(path), None)
    out.begin({"machine": "m"}, [{"op": "kept"}])
    assert json.loads(path.read_text()) == {"machine": "m", "rows": [{"op": "kept"}]}
    out.add({"op": "a"})

    def crash(*_):
        raise SystemExit

    monkeypatch.setattr(results.os, "replace", crash)
    with pytest.raises(SystemExit):
        out.add({"op": "b"})
    rows = [{"op": "kept"}, {"op": "a"}]
    assert json.loads(path.read_text()) == {"machine": "m", "rows": rows}


def test_no_time_is_left_for_the_last_cases(bench, monkeypatch, tmp_path):
    shares = iter([1.0, 0.0, None])
    monkeypatch.setattr(Budget, "next", lambda self: next(shares))
    monkeypatch.setattr(Budget, "limited", True)
    found = bench("--json", tmp_path / "r.json")
    assert found.prepared == [0, 1]
    assert (
        "few repetitions for lack of time: gather_tokens, case 1, float32, forward: 1" in found.out
    )
    assert "not measured for lack of time: gather_tokens, case 2, float32, forward" in found.out
    assert f"--resume {tmp_path / 'r.json'} goes on with them" in found.out


def test_a_row_has_its_interval_and_the_ceiling_that_bounds_it(bench, tmp_path):
    target = tmp_path / "r.json"
    assert bench("--json", target).status == 0
    document = json.loads(target.read_text())
    assert document["schema"] == 2 and document["ceilings"]["flops"] == {"float32": 1e9}
    row = document["rows"][0]
    for timed in (row, row["peers"]["good"]):
        low, high = timed["interval"]
        assert low <= timed["seconds"] <= high
        assert timed["coverage"] == 0.9375 and timed["rounds"] == 5
    assert row["bound"] == "memory"
    assert math.isclose(row["bound_share"], row["bytes_per_second"] / 4.5e9)
    assert math.isclose(row["peak_share"], row["flops"] / 1e9)


# Ceilings


def primitive(name, value, **facts):
    return {"primitive": name, "title": name, "unit": "B/s", "value": value, "threads": 1} | facts


PRIMITIVES = [
    primitive("fma", 5.0, dtype="float32"),
    primitive("matmul", 7.0, dtype="float32"),
    primitive("matmul", 3.0, dtype="bfloat16"),
    primitive("copy", 9.0, bytes=100),
    primitive("copy", 4.0, bytes=1000),
    primitive("read", 5.0, bytes=1000),
    primitive("copy", 99.0, bytes=1000, threads=2),
    {"primitive": "exp", "title": "exp", "unit": "1/s", "absent": "E: none"},
]


def test_ceilings_of_primitives():
    found = ceilings.from_primitives(PRIMITIVES, "cpu", 1)
    assert found.flops == {"float32": 7, "bfloat16": 7}  # may be computed as float32
    assert [found.bytes_per_second(n) for n in (1, 100, 1000, 1e9)] == [9, 9, 5, 5]
    assert math.isclose(found.bytes_per_second(1000**0.5 * 10), 7)  # half way, by the logarithm
    assert found.memory == 5
    assert ceilings.from_primitives(PRIMITIVES, "cuda", 8).bytes_per_second(1) == 9
    with pytest.raises(ValueError, match="no rates and copies of 2 thread"):
        ceilings.from_primitives(PRIMITIVES, "cpu", 2)


def test_a_gpu_is_asked_for_products_that_it_has(monkeypatch):
    asked = []
    monkeypatch.setattr(ceilings, "_gpu_product_rate", lambda dtype: asked.append(dtype) or 1.0)
    monkeypatch.setattr(ceilings, "copy_bandwidth", lambda gpu, threads: 1.0)
    dtypes = [*{c.dtype for c in case.cases(registry.ops())}]
    assert torch.int32 in dtypes
    found = ceilings.measured(dtypes, True, 1)
    assert ceilings.with_dtypes(MADE_UP, dtypes, True, 1).flops.keys() == found.flops.keys()
    assert all(dtype.is_floating_point for dtype in asked)


def test_rows_that_are_kept_are_compared_with_new_ceilings(bench, tmp_path):
    target, measured = tmp_path / "r.json", tmp_path / "p.json"
    assert bench("--resume", target).status == 0
    before = json.loads(target.read_text())
    rows = [primitive("fma", 2e9, dtype="float32"), primitive("copy", 1e12, bytes=1000)]
    head = {"kind": "primitives", "machine": before["machine"], "device": "cpu", "rows": rows}
    measured.write_text(json.dumps(head))
    assert bench("--resume", target, "--primitives", measured).prepared == []
    for old, row in zip(before["rows"], json.loads(target.read_text())["rows"], strict=True):
        assert math.isclose(row["peak_share"], old["peak_share"] / 2)
        assert row["bound"] == "memory"
        assert math.isclose(row["bound_share"], row["bytes_per_second"] / 1e12)
    measured.write_text(json.dumps(head | {"device": "cuda"}))
    found = bench("--primitives", measured)
    assert found.status == 2 and "on this machine for this device" in found.err
    times = page.Machine("m", {}, {"device": "cuda", "rows": []}, measured=[head])
    assert times.primitives == rows and times.ceilings == []


def test_threads_measure_at_the_same_time():
    """Each measurement has its own thread, even if another one ends early."""
    seen = []
    rates = primitives_cpu._together(3, lambda: seen.append(threading.get_ident()) or 1.0)(0.0)
    assert {*rates} == {3.0}
    for i in range(0, len(seen), 3):
        assert len({*seen[i : i + 3]}) == 3


def test_parts_of_a_working_set_are_reported_as_they_are(monkeypatch):
    monkeypatch.setattr(primitives_cpu, "cores", lambda: 64)
    sets = [p.facts["bytes"] for p in primitives_cpu.probes() if p.primitive == "copy"]
    assert sets[len(sets) // 2] == 64 * primitives_cpu.STEP  # 128 KiB, not 32
    assert len({*sets}) >= 7


def test_bench_takes_ceilings_from_primitives(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "measured", lambda *_: pytest.fail("they were measured"))
    measured = tmp_path / "p.json"
    words = ["--json", str(measured), "--seconds", "0"]
    assert main(["bench", "primitives", *words, "--filter", "(fma|copy 32 KiB).* 1 thread"]) == 0
    target = tmp_path / "r.json"
    assert bench("--primitives", measured, "--json", target).status == 0
    document = json.loads(target.read_text())
    assert document["ceilings"]["from"] == "primitives"
    assert {row["primitive"] for row in document["primitives"]} == {"fma", "copy"}
    assert bench("--resume", target).status == 0  # they are in the file
    page = tmp_path / "page.html"
    assert main(["report", str(target), str(measured), "--out", str(page)]) == 0
    text = page.read_text()
    assert "<h2>Primitives</h2>" in text and "bound by memory" in text
    assert main(["bench", "report", str(measured)]) == 0
    measured.write_text(target.read_text())
    found = bench("--primitives", measured)
    assert found.status == 2 and "must be what bench primitives --json wrote" in found.err


def test_primitives_of_this_cpu(monkeypatch):
    monkeypatch.setattr(primitives_cpu, "PRODUCT", 16)
    monkeypatch.setattr(primitives_cpu, "SIZES", [1 << 15])
    monkeypatch.setattr(primitives_cpu, "LARGEST", 0)
    monkeypatch.setattr(primitives_cpu, "cores", lambda: 2)
    rows = [primitives.measured(probe, 0.0) for probe in primitives_cpu.probes()]
    assert all(row["value"] > 0 for row in rows)
    assert {(row["primitive"], row["threads"]) for row in rows} >= {
        *(
            (name, threads)
            for name in ("fma", "matmul", "exp", "read", "copy")
            for threads in (1, 2)
        ),
        ("parallel region", 2),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("write",), "of: must be 'read', 'copy', 'exp' or 'region'; got 'write'"),
        (("read", 100), "bytes: must be a multiple of 2048 up to 2^34; got 100"),
        (("copy",), "bytes: must be a multiple of 2048 up to 2^34; got 0"),
        (("exp", 0, 0), "repeats: must be at least 1; got 0"),
    ],
)
def test_rates_refuse_what_they_cannot_measure(arguments, message):
    with pytest.raises(RuntimeError) as error:
        torch.ops.tokenmill.cpu_rate(*arguments)
    assert f"tokenmill.cpu_rate: {message}" in str(error.value)


def test_the_peers_of_recipes_compute_the_same():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=draw) for _ in range(3))
    ours = tm.moba_attention(*(t.transpose(1, 2) for t in (q, k, v)), block=16, topk=2)
    theirs = moba_attention.masked(q, k, v, 16, 2)
    torch.testing.assert_close(theirs.transpose(1, 2), ours, rtol=1e-4, atol=1e-5)
    assert moba_attention.pairs(64, 16, 2) == 4 * 136 + 3 * 256
    q, gates = torch.randn(1, 4, 64, 8, generator=draw), torch.rand(1, 4, 64, 3, generator=draw)
    sizes = native_sparse_attention.SIZES | {
        "block": 8, "stride": 4, "select_block": 8, "topk": 4, "window": 20
    }  # fmt: skip
    ours = tm.native_sparse_attention(*(t.transpose(1, 2) for t in (q, k, v, gates)), **sizes)
    theirs = native_sparse_attention.masked(q, k, v, gates, **sizes)
    torch.testing.assert_close(theirs.transpose(1, 2), ours, rtol=1e-4, atol=1e-5)


def test_recipes_are_named_beside_operators(capsys):
    assert main(["bench", "--list", *case.RECIPES]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in listed} == {*case.RECIPES}
