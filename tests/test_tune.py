"""Knobs, the cache of tuned values, and the command that fills it."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tokenmill as tm
from tokenmill import _emulator, _knobs, registry
from tokenmill.__main__ import main
from tokenmill._call import library
from tokenmill._knobs import KNOBS, Knob
from tokenmill._version import __version__
from tokenmill.bench import case, tune
from tokenmill.bench.case import cases
from tokenmill.testing import emulated_cuda

NATIVE = [k for k in KNOBS.values() if k.backend != "triton"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "tune.json"
    monkeypatch.setenv(_knobs.VARIABLE, str(file))
    yield file
    for knob in KNOBS.values():
        _knobs.put(knob.name, knob.standard)


def test_both_tables_of_knobs_agree():
    for knob in NATIVE:
        assert library.native.knob(knob.name) == knob.standard, knob.name
        for number in knob.valid:
            library.native.knob(knob.name, number)
        assert library.native.knob(knob.name, knob.standard) in knob.valid
    assert all(k.op in registry.ops() and k.name.startswith(k.op) for k in KNOBS.values())


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("attention.width", None, "tokenmill.knob: name: must be the name of a knob; got 'attent"),
        ("attention.shares", 0, "tokenmill.knob: set: must be 1 to 64; got 0"),
        (
            "attention.shares",
            2**62,
            "tokenmill.knob: set: must be 1 to 64; got 4611686018427387904",
        ),
    ],
)
def test_a_bad_knob_is_an_error(name, number, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        library.native.knob(name, number)


@pytest.fixture
def gpu(monkeypatch):
    """Lists the benchmarks of a GPU without preparing them."""
    monkeypatch.setattr(case, "device", torch.device("cuda"))


def test_every_knob_has_benchmarks(gpu):
    titles = {op: [c.title for c in cases([op])] for op in {k.op for k in KNOBS.values()}}
    for knob in KNOBS.values():
        found = [title for title in titles[knob.op] if re.search(knob.cases, title)]
        assert found, knob.name
        if knob.name.startswith("attention.triton"):  # only the tiles of these two are tuned
            assert all(re.match(r"(sigmoid|softmax) \w+ S", title) for title in found), found


def calls(dtype=torch.float32):
    """A call of each operator with a native knob, which the minimum and the maximum value split
    differently."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 200, 4, 64, dtype=dtype), torch.randn(1, 200, 2, 64, dtype=dtype)
    indices = torch.arange(4, dtype=torch.int32).expand(1, 2, 4, 4).contiguous()
    counts = torch.full((1, 2, 4), 4, dtype=torch.int32)
    scores = torch.randn(1, 600, 4, 32, dtype=dtype)
    keys, weights = torch.randn(1, 600, 32, dtype=dtype), torch.randn(1, 600, 4)
    a, b = torch.randn(2, 300, 64, dtype=dtype), torch.randn(2, 200, 64, dtype=dtype)
    features = torch.randn(1, 800, 320, dtype=dtype)
    return {
        "attention": lambda: tm.attention(q, k, k, causal=True),
        "block_sparse_attention": lambda: tm.block_sparse_attention(
            q, k, k, indices, counts, block_q=64, block_k=64
        ),
        "indexer_topk_select": lambda: tm.indexer_topk_select(scores, keys, weights, topk=16),
        "best_match": lambda: tm.best_match(a, b),
        "cluster_tokens": lambda: tm.reconstruct_tokens(
            features, features[:, ::5], features[:, ::5], tau=1.0
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_knobs_without_order_change_no_bit(dtype, threads):
    threads(2)
    for op, call in calls(dtype).items():
        expected = call()
        for knob in NATIVE:
            if knob.op == op and knob.backend == "cpu":
                assert not knob.order
                for number in (min(knob.valid), max(knob.valid)):
                    with _knobs.override(**{knob.name.replace(".", "__"): number}):
                        torch.testing.assert_close(call(), expected, rtol=0, atol=0)


def test_a_range_of_a_decode_changes_the_order_of_sums_alone(threads):
    k = torch.randn(1, 8192, 2, 64)
    q, lengths = torch.randn(1, 1, 4, 64), torch.tensor([8000], dtype=torch.int32)
    expected = tm.attention_decode(q, k, k, seqlens_k=lengths)
    with _knobs.override(attention_decode__range=64):
        found = tm.attention_decode(q, k, k, seqlens_k=lengths)
        threads(1)
        assert torch.equal(tm.attention_decode(q, k, k, seqlens_k=lengths), found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not library.emulated_built(), reason="no CUDA kernels here")
@pytest.mark.parametrize(
    ("name", "values"), [("best_match.fill", (1, 2)), ("hip_block_select.fill", (0, 1))]
)
def test_knobs_of_cuda_change_no_bit(name, values):
    """Both values are on different sides of a kernel choice."""
    multiprocessors = int(os.environ.get("PTXVM_SMS", "132"))
    a, b = torch.randn(multiprocessors, 65, 8), torch.randn(multiprocessors, 3, 8)
    q, k = torch.randn(1, 16, 1, 8), torch.randn(1, 80, 1, 8)
    sizes = {"block_q": 16, "block_k": 2, "stride_q": 2, "budget": 16}
    call = {
        "best_match.fill": lambda: tm.best_match(a, b),
        "hip_block_select.fill": lambda: tm.hip_block_select(q, k, **sizes),
    }[name]
    results, kernels = [], []
    for number in values:
        with emulated_cuda(), _knobs.override(**{name.replace(".", "__"): number}):
            with _emulator.counting() as launches:
                results.append(call())
            assert library.loaded_emulated().knob(name) == number
            kernels.append([launch["kernel"] for launch in launches])
    assert kernels[0] != kernels[1]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def entry(**knobs):
    return {"knobs": {name.replace("__", "."): number for name, number in knobs.items()}}


def test_the_cache_keeps_what_others_wrote(cache):
    cpu = _knobs.device_name("cpu")
    assert _knobs.read(cache) == {}
    _knobs.write(cache, "another", "attention", entry(attention__shares=8))
    _knobs.write(cache, cpu, "best_match", entry(best_match__words=32768))
    _knobs.write(cache, cpu, "attention", entry(attention__shares=2))
    _knobs.write(cache, cpu, "attention", entry(attention__shares=16))
    assert list(cache.parent.iterdir()) == [cache]
    assert sorted(_knobs.read(cache)) == sorted(["another", cpu])
    _knobs.load()
    assert _knobs.value("attention.shares") == 16 and _knobs.value("best_match.words") == 32768


def test_others_may_read_the_cache_and_a_link_to_it_stays(cache, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(cache)
    _knobs.write(link, "cpu", "attention", entry(attention__shares=8))
    assert link.is_symlink() and stat.S_IMODE(cache.stat().st_mode) == 0o644
    cache.chmod(0o600)
    _knobs.write(link, "cpu", "attention", entry(attention__shares=2))
    assert _knobs.entry_of(cache, "cpu", "attention") == entry(attention__shares=2)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600


def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path, monkeypatch, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path(os.devnull)):
        assert _knobs.read(path) == {}
        with pytest.raises(OSError, match="not a regular file"):
            _knobs.write(path, "cpu", "attention", entry(attention__shares=8))
    assert [*tmp_path.iterdir()] == [pipe] and pipe.is_fifo() and not Path(os.devnull).is_file()
    monkeypatch.setenv(_knobs.VARIABLE, str(pipe))
    monkeypatch.setattr(tune, "_tune", lambda *_: pytest.fail("it was measured"))
    assert main(["tune", "best_match", "--device", "cpu"]) == 2
    message = f"TOKENMILL_TUNE_CACHE: must be writable; got '{pipe}' (not a regular file)"
    assert message in capsys.readouterr().err


def test_values_of_other_versions_and_devices_are_not_taken(cache):
    cache.parent.mkdir()
    mine, other = {"attention": entry(attention__shares=8)}, {"attention": entry(nonsense=1)}
    devices = {"another": {__version__: mine}, _knobs.device_name("cpu"): {"0.0.1": other}}
    cache.write_text(json.dumps({"format": _knobs.FORMAT, "devices": devices}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _knobs.load()
    assert _knobs.value("attention.shares") == 4


def of_this_machine(**knobs):
    versions = {__version__: {"attention": entry(**knobs)}}
    return json.dumps({"format": _knobs.FORMAT, "devices": {_knobs.device_name("cpu"): versions}})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\xff\xfe", "codec can't decode"),
        ("[]", "its format is not 'tokenmill tune 1'"),
        ('{"format": "another"}', "its format is not"),
        ('{"format": "tokenmill tune 1"}', "are not where they belong"),
        ('{"format": "tokenmill tune 1", "devices": {"cpu": [1]}}', "are not where they belong"),
        (lambda: of_this_machine(attention__shares=3), "must be one of 1, 2, 4, 8, 16; got 3"),
        (lambda: of_this_machine(attention__shares=True), "must be one of .*; got True"),
        (lambda: of_this_machine(attention__shares="8"), "must be one of .*; got '8'"),
        (
            lambda: of_this_machine(attention__sm90_section=20),
            "attention.sm90_section must be one of 0, 16, 24, 32, 48; got 20",
        ),
        (lambda: of_this_machine(best_match__words=32768), "attention has no knob 'best_match.w"),
    ],
)
def test_a_damaged_cache_is_one_warning(cache, text, why):
    text = text if isinstance(text, str) else text()
    cache.parent.mkdir()
    cache.write_bytes(text.encode("latin-1"))
    with pytest.warns(
        UserWarning, match=f"(?s)tuning cache .*tune.json is ignored: .*{why}"
    ) as seen:
        _knobs.load()
    assert len(seen) == 1
    assert all(_knobs.value(k.name) == k.standard for k in KNOBS.values())
    _knobs.write(cache, "cpu", "attention", entry(attention__shares=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _knobs.load()
    assert _knobs.read(cache)["cpu"][__version__] == {"attention": entry(attention__shares=8)}


@pytest.mark.parametrize("content", [b"", b" \n", None])
def test_no_cache_is_no_warning(cache, content):
    if content is not None:
        cache.parent.mkdir()
        cache.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _knobs.load()


def test_the_import_reads_the_cache(cache):
    _knobs.write(cache, _knobs.device_name("cpu"), "attention", entry(attention__shares=8))
    code = "import tokenmill as tm; print(tm._knobs.value('attention.shares'))"
    environment = os.environ | {_knobs.VARIABLE: str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.strip() == b"8", done.stderr


def test_a_gpu_gets_its_values_when_torch_initialises_it(cache, monkeypatch):
    later = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", later.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: "A GPU")
    _knobs.write(cache, "A GPU", "best_match", entry(best_match__fill=4))
    _knobs.write(cache, "A GPU", "attention", entry(attention__triton64__stages=3))
    _knobs.load()
    assert _knobs.value("best_match.fill") == 2 and len(later) == 1
    later[0]()
    assert _knobs.value("best_match.fill") == 4 and _knobs.value("attention.triton64.stages") == 3
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: f"GPU {i}")
    assert _knobs.device_name("cuda") == ""


def test_torch_can_call_later():
    assert callable(torch.cuda._lazy_call)  # private: without it GPUs would not be tuned


@pytest.mark.parametrize(
    ("ratios", "best"),
    [
        ({4: [1.0, 1.0], 8: [0.9, 0.95]}, 8),
        ({4: [1.0, 1.0], 8: [0.99, 0.99]}, 4),  # too little
        ({4: [1.0, 1.0], 8: [0.5, 1.1]}, 4),  # slower in one
        ({4: [1.0, 1.0], 8: [0.9, 0.9], 16: [0.8, 0.8]}, 16),
        ({4: [1.0]}, 4),
    ],
)
def test_what_is_taken(ratios, best):
    assert tune.choose(4, ratios) == best


def fake_times(monkeypatch, seconds):
    """Sets measured times to seconds(knob, value, number of the measurement)."""
    measured = []

    def times(self, knob, case, values):
        measured.append(case.title)
        return {v: seconds(knob, v, len(measured)) for v in values}

    monkeypatch.setattr(tune.Clock, "times", times)


def test_the_best_is_kept_and_taken(cache, monkeypatch, capsys):
    fake_times(monkeypatch, lambda knob, value, _: 1 / value)
    assert main(["tune", "best_match", "--device", "cpu", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"best_match.words +65536 +262144 +4.00x  4.00 4.00", out)
    assert f"wrote {cache}" in out
    found = _knobs.read(cache)[_knobs.device_name("cpu")][__version__]["best_match"]
    assert found["knobs"] == {"best_match.words": 262144} and found["threads"] == 1
    assert _knobs.value("best_match.words") == 262144


def test_luck_is_not_kept(cache, monkeypatch, capsys):
    fake_times(monkeypatch, lambda knob, value, n: 0.5 if value == 16384 and n <= 4 else 1.0)
    assert main(["tune", "best_match", "--device", "cpu"]) == 0
    assert "not confirmed" in capsys.readouterr().out
    entries = _knobs.read(cache)[_knobs.device_name("cpu")][__version__]
    assert entries["best_match"]["knobs"] == {}


def test_a_dry_run_and_a_spent_budget_write_nothing(cache, monkeypatch, capsys):
    fake_times(monkeypatch, lambda knob, value, _: 1 / value)
    assert main(["tune", "best_match", "--device", "cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4.00x" in out and "wrote" not in out
    assert main(["tune", "attention", "--device", "cpu", "--time-budget", "0.000001"]) == 0
    out = capsys.readouterr().out
    assert "not reached" in out and "wrote" not in out
    assert not cache.exists()


def test_a_knob_that_was_not_tried_keeps_what_it_has(cache, monkeypatch, capsys):
    """An operator has three knobs: the second fails and the third is not reached."""
    name, names = _knobs.device_name("cpu"), [f"test.{part}" for part in "abcd"]
    knobs = {n: Knob(n, "best_match", "cpu", 1, (2, 3), "", "C=64") for n in names}
    knobs["test.d"] = replace(knobs["test.d"], order=True)
    now = dict.fromkeys(knobs, 1)
    monkeypatch.setattr(_knobs, "put", now.__setitem__)
    for module in (_knobs, tune):
        monkeypatch.setattr(module, "KNOBS", knobs)
    old = {"knobs": dict.fromkeys(names, 3), "gain": dict.fromkeys(names, 1.5)}
    _knobs.write(cache, name, "best_match", old)

    def seconds(knob, value, _):
        if knob.name == "test.b":
            monkeypatch.setattr(tune.Clock, "over", True)
            raise MemoryError
        return abs(value - 2) + 1.0

    fake_times(monkeypatch, seconds)
    assert main(["tune", "best_match", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"test.a +1 +2 +2.00x", out) and re.search(r"test.c +1 +3 +not reached", out)
    assert "failed: MemoryError" in out and f"wrote {cache}" in out
    found = _knobs.entry_of(cache, name, "best_match")
    assert found["knobs"] == {n: 2 if n == "test.a" else 3 for n in names}
    assert found["gain"] == {n: 2.0 if n == "test.a" else 1.5 for n in names}
    assert [now[n] for n in names[:3]] == [2, 3, 3]


def test_order_is_asked_for(cache, monkeypatch, capsys):
    fake_times(monkeypatch, lambda knob, value, _: 1 / value)
    assert main(["tune", "attention_decode", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "nothing to tune: those of cpu change the order of sums: --allow-order" in out
    assert main(["tune", "attention_decode", "--device", "cpu", "--allow-order"]) == 0
    assert "attention_decode.range" in capsys.readouterr().out
    assert _knobs.value("attention_decode.range") == 1024


@pytest.mark.parametrize("wrong", [8, 4])
def test_a_value_that_cannot_run_is_left_out(wrong, monkeypatch):
    """A real measurement of a call that one value breaks."""
    knob = KNOBS["attention.shares"]
    monkeypatch.delenv("TOKENMILL_BACKEND", raising=False)
    clock = tune.Clock(Namespace(device="cpu", threads=1, time_budget=9.0), 0.0)
    case = Namespace(prepare=lambda: (lambda: 1 // (_knobs.value(knob.name) - wrong), {}))
    with _knobs.override(attention__shares=2):
        if wrong == knob.standard:
            with pytest.raises(ZeroDivisionError):
                clock.times(knob, case, [4, 8])
        else:
            assert list(clock.times(knob, case, [4, 8])) == [4]
            clock = replace(clock, measure=lambda run: run() and 7.0)  # as on a GPU
            assert clock.times(knob, case, [4, 8]) == {4: 7.0}
    assert "TOKENMILL_BACKEND" not in os.environ


def test_the_list_names_every_knob(capsys):
    assert main(["tune", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in KNOBS) and "--allow-order" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge_attention_states"], "op: must be one with knobs (attention, "),
        (["attention", "merge_attention_states"], "got 'merge_attention_states'"),
        (["attention", "--time-budget", "0"], "--time-budget: must be a time of more than 0 such"),
        (["attention", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_tiles_of_triton_are_tuned_where_they_were_measured():
    pytest.importorskip("triton")
    from tokenmill.triton_kernels.dense.attention import Tiles
    from tokenmill.triton_kernels.tuned import tuned

    tiles, q = Tiles(128, 64, 8, 2), torch.empty(1, 64, dtype=torch.bfloat16)
    assert tuned("attention", tiles, q, 64, True) is tiles
    with _knobs.override(attention__triton64__stages=3, attention__triton64__block_m=64):
        assert tuned("attention", tiles, q, 64, True) == Tiles(64, 64, 8, 3)
        for other in ((q, 128, True), (q, 64, False), (q.float(), 64, True), (q, 300, True)):
            assert tuned("attention", tiles, *other) is tiles
        assert tuned("linear_attention", tiles, q, 64, True) is tiles
    with _knobs.override(attention__triton64__stages=4, attention__triton64__block_n=128):
        assert tuned("attention", tiles, q, 64, True) is tiles  # 147 KB


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs without a GPU")
def test_a_tuned_triton_kernel_is_right():
    pytest.importorskip("triton")
    q = torch.randn(1, 40, 1, 16, dtype=torch.bfloat16)
    options = {"causal": True, "backend": "triton"}
    expected = tm.attention(q, q, q, **options)
    small = {"attention__triton64__block_m": 16, "attention__triton64__block_n": 16}
    with _knobs.override(**small):
        found = tm.attention(q, q, q, **options)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
