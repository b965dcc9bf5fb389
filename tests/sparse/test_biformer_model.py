"""Whole BiFormer models out of the layers, against literal readings of the published ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import biformer_oracle as oracle
import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "examples" / "biformer_model.py"
if not PATH.exists():
    pytest.skip("not a source tree", allow_module_level=True)
SOURCE = importlib.util.spec_from_file_location("biformer_model", PATH)
example = sys.modules["biformer_model"] = importlib.util.module_from_spec(SOURCE)
SOURCE.loader.exec_module(example)

each_model = pytest.mark.parametrize("name", example.MODELS)
PARAMETERS = {"tiny": 13.1, "small": 25.5, "base": 56.8, "stl": 28.4}  # millions, as published


def shapes(layout):
    given = dataclasses.asdict(layout)
    return oracle.shapes(**given)


def weights(layout, seed):
    """Random ones with which maps keep their size, under the published names."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(layout).items():
        t = torch.randn(shape, generator=g)
        if name.endswith("num_batches_tracked"):
            t = torch.tensor(0)
        elif name.endswith("running_var"):
            t = t.abs() / 4 + 0.75
        elif len(shape) > 1:
            t = t / math.sqrt(math.prod(shape[1:]))
        else:
            t = t / 8 + (1 if "norm" in name and name.endswith("weight") else 0)
        found[name] = t
    return found


@each_model
def test_names_and_shapes_are_the_published_ones(name):
    layout = example.MODELS[name]
    with torch.device("meta"):
        model = example.BiFormer(layout)
    wanted = shapes(layout)
    model.load_state_dict({n: torch.empty(s, device="meta") for n, s in wanted.items()})
    count = sum(p.numel() for p in model.parameters())
    assert name not in PARAMETERS or round(count / 1e6, 1) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "depths", "size"),
    [
        ("tiny", (2, 1, 2, 2), (112, 144)),
        ("base", (1, 1, 1, 1), (112, 112)),
        ("stl", (1, 1, 1, 1), (112, 112)),
        ("stl-channels-first", (1, 1, 1, 1), (112, 144)),
    ],
)
def test_logits_are_those_of_the_published_model(name, depths, size):
    """Also where regions do not divide the maps."""
    layout = dataclasses.replace(example.MODELS[name], depths=depths)
    w = weights(layout, seed=0)
    model = example.BiFormer(layout).eval()
    model.load_state_dict(w)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = model(x)
        wanted = oracle.logits(x, w, layout.depths, layout.swin, layout.channels_first)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_example_loads_a_checkpoint(tmp_path, monkeypatch, capsys):
    path = tmp_path / "biformer.pth"
    torch.save({"model": weights(example.MODELS["tiny"], seed=0)}, path)
    monkeypatch.setattr("sys.argv", ["biformer_model.py", "--side", "56", "--weights", str(path)])
    example.main()
    assert capsys.readouterr().out.startswith("tiny: 13.1 M parameters, 56x56 pixels in ")
