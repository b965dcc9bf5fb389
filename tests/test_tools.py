"""python -m tokenmill: output of its commands, refusals, and exit statuses."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import json
import os
import sys

import pytest
import torch

import tokenmill as tm
from tokenmill import _cli, _explain, demo, registry, testing
from tokenmill.__main__ import main
from tokenmill._call import choose
from tokenmill.bench import ceilings, plot, progress, run
from tokenmill.bench.case import Absent, Case
from tokenmill.bench.results import Results

COMMANDS = (
    "info", "ops", "explain", "check", "bench", "bench primitives", "bench report", "tune",
    "report", "demo", "papers",
)  # fmt: skip
HAS_GPU = torch.cuda.is_available()
no_gpu = pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
plots = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
shown = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("matplotlib", "rich")),
    reason="what the demo is shown with is not installed",
)


def test_info_names_build_machine_and_backends(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("version", "cpu_isas", "cuda_driver", "torch", "driver ", "reference"):
        assert word in out
    assert "TOKENMILL_BACKEND" in out


def test_ops_is_the_table_of_the_registry(capsys):
    assert main(["ops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:-3] == ["operator", "family", *choose.BACKENDS]
    rows = {line.split()[0]: line.split()[1:] for line in lines if not line.startswith(" ")}
    assert set(registry.ops()) <= set(rows)
    assert rows["attention"][:2] == ["dense", "yes"]
    assert rows["attention"][-3:] == ["yes", "batch,", "heads"]


def test_explain_speaks_for_samples(capsys):
    assert main(["explain", "attention"]) == 0
    assert capsys.readouterr().out.startswith("tokenmill.attention: cpu (")
    assert main(["explain", "attention", "--sample", "packed", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tokenmill.attention: reference (")
    assert "not cpu: float64 runs only on the reference backend" in out


BAD = [
    ("nosuch", "command: no command 'nosuch'; python -m tokenmill --help lists all"),
    ("chekc", "command: no command 'chekc' (did you mean 'check'?); python -m tokenmill --help"),
    ("--nosuch info", "unrecognized arguments: --nosuch"),
    ("info x", "unrecognized arguments: x"),
    ("ops --all", "unrecognized arguments: --all"),
    ("bench --out x", "unrecognized arguments: --out"),
    ("bench --out x --help", "unrecognized arguments: --out"),
    ("infoo --json", "command: no command 'infoo' (did you mean 'info'?); "),
    ("bench attention --json -out.json", "--json: expected one argument"),
    ("explain --no=1 nosuch --dtype float9", "op: no operator 'nosuch'"),
    ("explain", "required: op"),
    ("explain atention", "op: no operator 'atention' (did you mean 'attention'?); python "),
    ("explain attention --sample x", "--sample: must be one of softmax, "),
    ("explain attention --device tpu", "--device: must be a device of this machine (cpu"),
    ("explain attention --device cuda:99", "--device: must be a device of this machine (cpu"),
    ("explain attention --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("explain attention --backend x", "--backend: invalid choice: 'x'"),
    ("check nosuch", "ops: no operator 'nosuch'; python -m tokenmill ops lists all"),
    ("check topk", " (did you mean 'topk_select', 'topk_partition' or 'indexer_topk_select'?)"),
    ("check --backend x", "--backend: invalid choice: 'x'"),
    ("check --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("check --backend reference --all-isas", "--all-isas: must go with backend cpu; got reference"),
    ("bench nosuch", "ops: no operator 'nosuch'"),
    ("bench --filter (", "--filter: must be a regular expression; got '(' (missing ), "),
    ("bench --filter nosuch", "--filter: no case matches; got 'nosuch'"),
    ("bench --seconds -1", "--seconds: must be a number of at least 0; got '-1'"),
    ("bench --seconds nan", "--seconds: must be a number of at least 0; got 'nan'"),
    ("bench --seconds inf", "--seconds: must be a number of at least 0; got 'inf'"),
    ("bench --threads 0", "--threads: must be a whole number from 1 to "),
    ("bench --threads 99999", "--threads: must be a whole number from 1 to "),
    ("bench --threads two", "--threads: must be a whole number from 1 to "),
    ("bench --device tpu", "--device: invalid choice: 'tpu'"),
    ("bench gather_tokens --json /dev/null/x", "--json: must be writable; got '/dev/null/x' ("),
    ("bench gather_tokens --json /", "--json: must be writable; got '/' ("),
    ("bench gather_tokens --resume /", "--resume: must be readable; got '/' ("),
    ("bench gather_tokens --primitives /", "--primitives: must be readable; got '/' ("),
    ("bench --time-budget 0s", "--time-budget: must be a time of more than 0 such as 90s, 10m"),
    ("bench --time-budget 1x", "--time-budget: must be a time of more than 0 such as 90s, 10m"),
    ("bench --time-budget 1m --seconds 1", "--seconds: not allowed with argument --time-budget"),
    ("bench --counters --resume x", "--resume: is for times; leave it out with counts"),
    ("bench --launches --time-budget 1m", "--time-budget: is for times; leave it out"),
    ("bench gather_tokens --resume -", "--resume: must be a file; got '-'"),
    ("bench primitives --device tpu", "--device: invalid choice: 'tpu'"),
    ("bench primitives --filter (", "--filter: must be a regular expression; got '(' ("),
    ("bench primitives --filter nosuch", "--filter: no primitive matches; got 'nosuch'"),
    ("bench primitives --filter exp --json /", "--json: must be writable; got '/' ("),
    ("demo --steps 0", "--steps: must be a whole number of at least 1; got '0'"),
    ("demo --steps x", "--steps: must be a whole number of at least 1; got 'x'"),
    ("demo --seed -1", "--seed: must be a whole number from 0 to "),
    ("demo --backend nosuch", "--backend: invalid choice: 'nosuch'"),
    ("papers nosuch", "papers: no paper of the index holds 'nosuch'"),
    ("papers 62", "papers: no paper of the index holds '62'"),
    ("papers --json --markdown", "--markdown: not allowed with argument --json"),
]
NO_GPU = [
    ("explain attention --device cuda", "--device: must be a device of this machine (cpu: there"),
    ("check --backend cuda", "--backend: must be a backend of this machine ("),
    ("bench --device cuda", "--device: must be a device of this machine (cpu: there is no GPU)"),
    ("bench primitives --device cuda", "--device: must be a device of this machine (cpu: there"),
]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *BAD,
        *(pytest.param(*bad, marks=no_gpu) for bad in NO_GPU),
        pytest.param(
            "bench gather_tokens --plot /dev/null/x", "--plot: must be writable", marks=plots
        ),
        pytest.param("demo --backend cuda", "--backend: 'cuda' cannot", marks=[no_gpu, shown]),
        pytest.param("demo --out /dev/null/x", "--out: must be writable", marks=shown),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(line, message, monkeypatch, capsys):
    monkeypatch.setattr(demo, "EXTRAS", ())  # the model is requested after the arguments
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err
    words = line.split()
    command = [" ".join(words[:2])] if " ".join(words[:2]) in COMMANDS else words
    program = " ".join(["tokenmill", *(word for word in command if word in COMMANDS)])
    assert err.startswith(f"{program}: ")


def test_counters_are_refused_without_the_machine(monkeypatch, capsys):
    monkeypatch.setattr(tm._call.library, "emulated_built", lambda: False)
    assert main(["bench", "--counters"]) == 2
    assert capsys.readouterr().err.startswith("tokenmill bench: --counters: needs a development")
    assert main(["bench", "--launches"]) == 2
    assert capsys.readouterr().err.startswith("tokenmill bench: --launches: needs a development")
    monkeypatch.setattr(tm._call.library, "emulated_built", lambda: True)
    assert main(["bench", "--counters", "--plot", "x"]) == 2
    assert capsys.readouterr().err.startswith("tokenmill bench: --plot: draws no counters")
    assert main(["bench", "--counters", "--list", "topk_select"]) == 0
    assert capsys.readouterr().out.startswith("topk_select: ")


def test_a_missing_matplotlib_is_found_before_measuring(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(_cli.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "_cases", lambda options: pytest.fail("it went on"))
    assert main(["bench", "--plot", str(tmp_path)]) == 2
    assert "--plot: needs matplotlib (pip install tokenmill[bench])" in capsys.readouterr().err


def test_an_unknown_operator_is_named_with_its_like():
    with pytest.raises(KeyError) as error:
        registry.get("linear_atention")
    assert str(error.value).startswith(
        "tokenmill: no operator 'linear_atention' (did you mean 'linear_attention', "
    )
    assert str(error.value).count("'") == 2 + 2 * 3  # not all names


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as leave:
        main(["--version"])
    assert leave.value.code == 0
    start = f"tokenmill {tm.__version__} (torch {torch.__version__}, Python 3."
    assert capsys.readouterr().out.startswith(start)


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: python -m tokenmill") and all(name in out for name in COMMANDS)
    assert not err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_there_for_every_command_and_width(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit) as leave:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert leave.value.code == 0 and out.startswith("usage: python -m tokenmill")
    if not command:
        assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    "line",
    ["ops", "info", "--help", "explain attention", "check gather_tokens", "bench --list", "papers"],
)
def test_a_closed_pipe_ends_a_command_quietly(line, monkeypatch, capfd):
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(line.split()) == 128 + 13
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_named(monkeypatch, capsys):
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["ops"]) == 1
    assert capsys.readouterr().err == "tokenmill: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_results_that_no_disk_takes_are_refused(quick, capsys):
    quick(refuse)
    assert main([*BENCH, "--json", "/dev/full"]) == 2
    assert "--json: must be writable; got '/dev/full' (No space" in capsys.readouterr().err


# check


def table(capsys):
    """The words of the rows of a check, and of its summary."""
    rows, summary = capsys.readouterr().out.split("\n\n")
    return [[line.split() for line in part.splitlines()] for part in (rows, summary)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_operator_checks_out_on_kernels_and_reference(dtype, threads, capsys, monkeypatch):
    """One sample per operator: tests/test_contract.py covers all."""
    for spec in registry.ops().values():
        monkeypatch.setitem(spec.__dict__, "samples", spec.samples[:1])
    threads(1)
    assert main(["check", "--backend", "cpu", "--backend", "reference", "--dtype", dtype]) == 0
    rows, summary = table(capsys)
    assert [row[:3] for row in rows] == [
        [backend, op, "ok"] for op in registry.ops() for backend in ("cpu", "reference")
    ]
    for backend, found in zip(("cpu", "reference"), summary[1:], strict=True):
        assert found[:5] == [backend, str(len(registry.ops())), "0", "0", "0"]
        assert found[5] == found[7]


def test_check_leaves_interpreters_to_those_who_ask(capsys):
    assert main(["check", "query_similarity_gate", "--dtype", "float32"]) == 0
    states = tm.backends()
    assert [row[0] for row in table(capsys)[0]] == [
        b for b in states if states[b].startswith("available")
    ]


def test_a_wrong_result_is_shown_and_fails_the_check(monkeypatch, capsys):
    monkeypatch.setattr(testing, "budget", lambda *args, **kwargs: 1e-30)
    assert main(["check", "merge_attention_states", "--backend", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "allowed 1e-30" in out


def test_one_draw_decides_as_four_do():
    spec, said = registry.get("local_pool"), set()
    for off in (0.0, *(3.0**-n for n in range(9, 16)), float("nan")):

        @functools.wraps(spec.function)
        def wrong(*args, off=off, **kwargs):
            return spec.function(*args, **kwargs) + off

        other = dataclasses.replace(spec, function=wrong)
        found = [testing.compare(other, spec.samples[0], "cpu", torch.float32, draws=n)
                 for n in (None, 4)]  # fmt: skip
        one, four = (all(c.ok for c in of) for of in found)
        assert one == four
        said.add(one)
    assert said == {True, False}


def test_a_call_that_fails_is_a_row_and_the_others_go_on(monkeypatch, capsys):
    compare = testing.compare

    def fail(spec, sample, backend, dtype, **options):
        if spec.name == "gather_tokens" and sample == spec.samples[0]:
            raise RuntimeError("the kernel\nis broken")
        return compare(spec, sample, backend, dtype, **options)

    monkeypatch.setattr(testing, "compare", fail)
    assert main(["check", "gather_tokens", "local_pool", "--backend", "cpu"]) == 1
    rows = capsys.readouterr().out
    assert f"{registry.get('gather_tokens').samples[0].name}, float16: RuntimeError: the ke" in rows
    gathered, pooled = (next(x for x in rows.splitlines() if op in x) for op in ("gath", "local"))
    assert "FAILED" in gathered and " ok " in pooled


def test_a_check_of_nothing_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(_explain, "kernels", lambda spec, backend: "-")
    assert main(["check", "attention", "--backend", "cpu"]) == 1
    assert "absent  no kernel in this build" in capsys.readouterr().out


def test_share_of_a_budget_of_nothing():
    exact, wrong = (testing.Comparison("indices", e, 0.0) for e in (0.0, 0.5))
    assert exact.ok and exact.share == 0
    assert not wrong.ok and wrong.share == float("inf")


# bench


@pytest.fixture
def quick(monkeypatch):
    """Sets the cases of a run, with synthetic peaks."""
    made_up = ceilings.Ceilings({"float32": 1e9}, ((1e9, 1e9),), "quick")
    monkeypatch.setattr(ceilings, "measured", lambda dtypes, gpu, threads: made_up)

    def use(*prepares):
        found = [
            Case("gather_tokens", f"case {i}", torch.float32, 1.0, 1.0, prepare, length=4 + i)
            for i, prepare in enumerate(prepares)
        ]
        monkeypatch.setattr(run, "cases", lambda ops: found)

    return use


def work():
    return sum(range(100))


def refuse():
    raise RuntimeError("no such shape")


def absent():
    raise Absent("not installed")


PEERS = {"good": lambda: work, "absent": absent, "unbuilt": refuse, "failing": lambda: refuse}
BENCH = ["bench", "gather_tokens", "--seconds", "0"]


@plots
def test_bench_measures_writes_and_draws(tmp_path, capsys):
    target = tmp_path / "new" / "r.json"
    files = ["--json", str(target), "--plot", str(tmp_path / "plots")]
    assert main(["bench", "merge_attention_states", "--seconds", "0.01", *files]) == 0
    written = json.loads(target.read_text())
    assert written["rows"] and written["device"] == "cpu"
    assert "eager" in capsys.readouterr().out
    assert (tmp_path / "plots" / "merge_attention_states.png").stat().st_size > 1000


def test_bench_names_its_cases(capsys):
    assert main(["bench", "--list"]) == 0
    assert "sigmoid dense S=512" in capsys.readouterr().out


def test_the_file_of_a_run_is_whole_after_every_row(quick, tmp_path, capsys):
    """Failing cases and peers are recorded; an interrupted run keeps its measurements."""
    target = tmp_path / "r.json"
    target.write_text("the results of an earlier run " * 99)
    seen = []

    def look():
        seen.append(json.loads(target.read_text())["rows"])
        return work, PEERS

    def cut_off():
        raise KeyboardInterrupt

    quick(look, refuse, look, cut_off)
    assert main([*BENCH, "--json", str(target)]) == 130
    assert [len(rows) for rows in seen] == [0, 2]
    assert capsys.readouterr().err == "tokenmill bench: interrupted\n"
    first, failed, third = json.loads(target.read_text())["rows"]
    assert list(first["peers"]) == ["good"] and first["seconds"] > 0
    error = "RuntimeError: no such shape"
    assert first["absent"] == {"absent": "not installed", "unbuilt": error, "failing": error}
    assert failed["error"] == error and failed["case"] == "case 1, float32, forward"
    assert third["length"] == 6


@plots
def test_a_failed_case_shows_in_the_status_and_not_in_the_plot(quick, tmp_path, capsys):
    quick(refuse, lambda: (work, PEERS))
    assert main([*BENCH, "--plot", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "failed: RuntimeError: no such shape" in out and "1 of 2 cases failed" in out
    assert (tmp_path / "gather_tokens.png").exists()
    quick(refuse)
    assert main([*BENCH, "--plot", str(tmp_path / "none")]) == 1
    assert not list((tmp_path / "none").iterdir())


def test_cases_that_cannot_be_made_are_a_failed_row(quick, monkeypatch, capsys):
    monkeypatch.setattr(run, "cases", lambda ops: refuse())
    assert main([*BENCH, "--json", "-"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["op"] == "gather_tokens" and "no such shape" in row["error"]
    assert main(["bench", "--list", "gather_tokens"]) == 1


def test_json_of_a_dash_is_stdout(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick(lambda: (work, PEERS))
    assert main([*BENCH, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["rows"]) == 1
    assert "geometric mean against good" in err
    assert not list(tmp_path.iterdir())


def test_results_may_go_to_a_device(capsys):
    results = Results("/dev/null", sys.stdout)
    results.begin({"machine": "m"})
    results.add({"op": "a"})
    results.end()
    assert results.document == {"machine": "m", "rows": [{"op": "a"}]}


def test_a_run_leaves_the_number_of_threads(quick, threads):
    threads(2)
    quick(lambda: (work, {}))
    assert main([*BENCH, "--threads", "1"]) == 0
    assert torch.get_num_threads() == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_leaves_what_is_printed_to_a_file_alone(monkeypatch, capsys):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress(2, "counting sheep") as advance:
        advance(start="a sheep [0]")
        advance(done=True)
        print("a row")
    assert capsys.readouterr().out == "a row\n"
    assert (
        "counting sheep: a sheep [0]" in terminal.getvalue() and "a row" not in terminal.getvalue()
    )


def test_lines_where_rich_is_missing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with progress.progress(2) as advance:
        advance(start="a sheep [0]")
        advance()
        advance(done=True)
    assert terminal.getvalue() == "[1/2] a sheep [0]\n"


def test_plots_of_results_that_were_cut_off(tmp_path):
    pytest.importorskip("matplotlib")
    row = {
        "op": "f", "case": "c", "seconds": 1.0, "flops": 1.0, "peak_share": 0.5,
        "bytes_per_second": 1.0, "peers": {},
    }  # fmt: skip
    machine = {"cpu": "c", "isa": "i", "torch": "t"}
    rows = [row, {"op": "f", "case": "d", "error": "E: e"}]
    document = {"machine": machine, "device": "cpu", "threads": 1, "rows": rows}
    document["copy_bandwidth"] = 1.0  # both ceilings bind a row: one picture has both panels
    rows.append(row | {"bytes_per_second": 2.0})
    assert plot.draw(document, tmp_path) == [tmp_path / "f.png"]


def test_folders_are_probed_and_left_empty(tmp_path):
    assert not list(_cli.writable_folder("--out", tmp_path / "a" / "b").iterdir())
