"""The models of BiFormer (Zhu et al. 2023) against the release (rayleizhu/BiFormer at 1697bbb,
ops/bra_nchw.py and models/)."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import biformer_oracle as oracle
import pytest
import torch
from literal import run_examples
from tensors import each_backend

import tokenmill as tm

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "biformer_model.py"
NARROW, WIDE = (64, 128, 256, 512), (96, 192, 384, 768)
MODELS = {
    "tiny": tm.nn.biformer_tiny,
    "small": tm.nn.biformer_small,
    "base": tm.nn.biformer_base,
    "stl": tm.nn.biformer_stl,
    "stl, channels first": lambda **options: tm.nn.biformer_stl(channels_first=True, **options),
}
# depths, channels, mlp_ratio, swin, channels_first, as oracle.shapes takes them
RELEASED = {
    "tiny": ((2, 2, 8, 2), NARROW, 3, False, False),
    "small": ((4, 4, 18, 4), NARROW, 3, False, False),
    "base": ((4, 4, 18, 4), WIDE, 3, False, False),
    "stl": ((2, 2, 6, 2), WIDE, 4, True, False),
    "stl, channels first": ((2, 2, 6, 2), WIDE, 4, True, True),
}
PARAMETERS = {"tiny": 13.1, "small": 25.5, "base": 56.8, "stl": 28.4}  # millions, as published


def weights(shapes, seed):
    """Random weights that preserve the scale of maps, under the published names."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
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


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        model = MODELS[name]()
    wanted = oracle.shapes(*RELEASED[name])
    model.load_state_dict({n: torch.empty(s, device="meta") for n, s in wanted.items()})
    count = sum(p.numel() for p in model.parameters())
    assert name not in PARAMETERS or round(count / 1e6, 1) == PARAMETERS[name]


@each_backend
@pytest.mark.parametrize(
    ("name", "depths", "size"),
    [
        ("tiny", (2, 1, 2, 2), (112, 144)),
        ("base", (1, 1, 1, 1), (56, 56)),
        ("stl", (1, 1, 1, 1), (112, 112)),
        ("stl, channels first", (1, 1, 1, 1), (112, 144)),
    ],
)
def test_logits_are_those_of_the_published_model(name, depths, size, backend):
    """Includes regions that do not divide the maps: maps of 28 x 36, 14 x 18 and 7 x 9 pixels have
    a side that 7 does not divide."""
    _, *rest = RELEASED[name]
    w = weights(oracle.shapes(depths, *rest), seed=0)
    model = MODELS[name](depths=depths, backend=backend).eval()
    model.load_state_dict(w)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = model(x)
        wanted = oracle.logits(x, w, depths, *rest[2:])
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@each_backend
def test_gradients_are_those_of_the_published_model(backend):
    """7 does not divide the size."""
    depths, channels = (1, 1, 1, 1), (32, 32, 64, 64)
    w = weights(oracle.shapes(depths, channels, 3, False, False), seed=0)
    model = tm.nn.BiFormer(depths, channels, backend=backend).eval()
    model.load_state_dict(w)
    x = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    names = [n if n in w else n.replace("qkv.", "qkv.qkv.") for n, _ in model.named_parameters()]
    leaves = {n: w[n].clone().requires_grad_() for n in names}
    wanted = oracle.logits(x, {**w, **leaves}, depths, False, False)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(wanted, list(leaves.values()), cotangent)
    model(x).backward(cotangent)
    for want, (name, parameter) in zip(grads, model.named_parameters(), strict=True):
        error = (parameter.grad - want).norm() / want.norm().clamp(min=1e-3)
        assert error < 1e-3, (name, error)


def test_features_are_the_maps_of_the_stages():
    model = tm.nn.BiFormer((1, 1, 1, 1), (32, 32, 64, 64), num_classes=0).eval()
    x = torch.randn(1, 3, 60, 100)
    maps = model.features(x)
    assert [list(t.shape[1:]) for t in maps] == [
        [32, 15, 25], [32, 8, 13], [64, 4, 7], [64, 2, 4],
    ]  # fmt: skip
    torch.testing.assert_close(model(x), model.norm(maps[-1]).mean((2, 3)))


def test_branches_are_left_out_of_whole_pictures():
    """The first block keeps all pictures; the last one drops both branches in a quarter of them."""
    torch.manual_seed(0)
    options = {"drop_path": 0.5, "channels_first": True, "num_classes": 0}
    model = tm.nn.BiFormer((1, 1, 1, 1), (32, 32, 64, 64), **options)
    blocks = [stage[0] for stage in model.stages]
    assert [block.drop_path.chance for block in blocks] == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    x = torch.ones(1000, 3, 2, 2)
    drop = blocks[-1].drop_path
    kept = drop(x).flatten(1)
    assert set(kept.unique().tolist()) == {0.0, 2.0} and bool((kept == kept[:, :1]).all())
    assert 0.4 < float(kept[:, 0].count_nonzero()) / 1000 < 0.6
    assert drop.eval()(x) is x


@pytest.mark.parametrize("layout", ["biformer", "swin"])
def test_no_pictures(layout):
    model = tm.nn.BiFormer((1, 1, 1, 1), (16, 16, 16, 16), head_dim=8, layout=layout).eval()
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 1000)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.BiFormer((1, 1, 1)), "depths: must be four, one for each stage; got [1, 1"),
        (lambda: tm.nn.BiFormer((1, 1, 1, 0)), "depths: must be 1 to 100; got 0"),
        (lambda: tm.nn.BiFormer(channels=(48, 64, 64, 64)),
         "head_dim: must divide the channels of a routed stage, 48; got 32"),
        (lambda: tm.nn.BiFormer(mlp_ratio=0), "mlp_ratio: must leave 1 to 2^31 - 1 hidden chan"),
        (lambda: tm.nn.BiFormer(drop_path=1), "drop_path: must be at least 0 and below 1; got 1"),
        (lambda: tm.nn.BiFormer(layout="vit"), "layout: must be 'biformer' or 'swin'; got 'vit'"),
        (lambda: small()(torch.zeros(3, 8, 8)), "x: must have shape [B, 3, Y, X]; got [3, 8, 8]"),
        (lambda: small(layout="swin")(torch.zeros(1, 3, 8, 40)),
         "x: must have at least 32 pixels a side; got [8, 40]"),
        (lambda: small()(torch.zeros(1, 3, 32, 20)),
         "x: must be more than one image of up to 32 x 32 pixels in training, for its norms; got"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError) as info:
        call()
    assert str(info.value).startswith(f"tokenmill.nn.BiFormer: {error}")


def small(**options):
    return tm.nn.BiFormer((1, 1, 1, 1), (8, 8, 8, 8), head_dim=8, **options)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="not a source tree")
def test_example_loads_a_checkpoint(tmp_path, monkeypatch, capsys):
    source = importlib.util.spec_from_file_location("biformer_model", EXAMPLE)
    example = importlib.util.module_from_spec(source)
    source.loader.exec_module(example)
    path = tmp_path / "biformer.pth"
    torch.save({"model": weights(oracle.shapes(*RELEASED["tiny"]), seed=0)}, path)
    monkeypatch.setattr("sys.argv", ["biformer_model.py", "--side", "56", "--weights", str(path)])
    example.main()
    assert capsys.readouterr().out.startswith("tiny: 13.1 M parameters, 56x56 pixels in ")


def test_examples_of_the_names():
    run_examples(tm.nn.biformer_tiny)
