"""The whole PoolFormer against a literal reading of its release and against timm."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from literal import assert_reads_as, randomised
from tensors import every_backend
from torch.utils.flop_counter import FlopCounterMode

import tokenmill as tm

MODELS = {
    # parameters (M) and multiplications (G) at 224 x 224, from the release
    "s12": (tm.nn.poolformer_s12, 12, 1.8),
    "s24": (tm.nn.poolformer_s24, 21, 3.4),
    "s36": (tm.nn.poolformer_s36, 31, 5.0),
    "m36": (tm.nn.poolformer_m36, 56, 8.8),
    "m48": (tm.nn.poolformer_m48, 73, 11.6),
}


def released(depths):
    """sail-sg/poolformer at a075575, models/poolformer.py."""

    def convolved(w, name, x, stride=1, padding=0):
        return F.conv2d(x, w[name + ".weight"], w[name + ".bias"], stride, padding)

    def normed(w, name, x):  # one group
        mean = x.mean((1, 2, 3), keepdim=True)
        variance = x.var((1, 2, 3), correction=0, keepdim=True)
        weight, bias = (w[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def literal(w, x):
        x = convolved(w, "patch_embed.proj", x, 4, 2)
        for stage, depth in enumerate(depths):
            if stage > 0:
                x = convolved(w, f"network.{2 * stage - 1}.proj", x, 2, 1)
            for i in range(depth):
                block = f"network.{2 * stage}.{i}."
                y = normed(w, block + "norm1", x)
                y = F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y
                x = x + w[block + "layer_scale_1"][:, None, None] * y
                y = convolved(w, block + "mlp.fc1", normed(w, block + "norm2", x))
                y = convolved(w, block + "mlp.fc2", F.gelu(y))
                x = x + w[block + "layer_scale_2"][:, None, None] * y
        x = normed(w, "norm", x).mean((2, 3))
        return x @ w["head.weight"].T + w["head.bias"]

    return literal


@every_backend
def test_the_released_model(backend):
    depths = (1, 2, 1, 1)
    model = randomised(tm.nn.PoolFormer(depths, (8, 12, 8, 16), num_classes=5, backend=backend))
    x = torch.randn(2, 3, 29, 33, requires_grad=True)
    assert_reads_as(model, released(depths), x, backend=backend, tolerance=1e-4)


@torch.no_grad()
def test_the_stages_of_timm():
    """timm's head differs: it norms the mean of the pixels, while the release norms the map."""
    metaformer = pytest.importorskip("timm.models.metaformer")
    torch.manual_seed(0)
    depths, channels = (1, 2, 1, 2), (8, 12, 8, 16)
    ours = randomised(tm.nn.PoolFormer(depths, channels, num_classes=5)).eval()
    theirs = metaformer.MetaFormer(
        depths=depths, dims=channels, num_classes=5, downsample_norm=None, mlp_bias=True,
        mlp_act=torch.nn.GELU, norm_layers=metaformer.GroupNorm1, layer_scale_init_values=1e-5,
        res_scale_init_values=None, use_mlp_head=False, token_mixers=metaformer.Pooling,
    ).eval()  # fmt: skip
    names = {
        r"^patch_embed\.proj": "stem.conv",
        r"^network\.([135])\.proj": lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.conv",
        r"^network\.([0246])\.(\d+)": lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}",
        r"layer_scale_(\d)": r"layer_scale\1.scale",
        r"^norm\.": "head.norm.",
        r"^head\.(weight|bias)": r"head.fc.\1",
    }
    state = {}
    for name, weight in ours.state_dict().items():
        for old, new in names.items():
            name = re.sub(old, new, name)
        state[name] = weight
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        ours.features(x)[-1], theirs.forward_features(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_the_released_models(name):
    """Multiplications are counted as in the release: products, and 5 per value of a norm."""
    build, millions, giga = MODELS[name]
    norms = []
    with torch.device("meta"), torch.no_grad():
        model = build().eval()
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_hook(lambda m, given, out: norms.append(5 * out.numel()))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "tokenmill" not in str(op))
    assert round((products / 2 + sum(norms)) / 1e9, 1) == giga


def test_options():
    model = tm.nn.PoolFormer((1,) * 4, (8,) * 4, num_classes=0, in_channels=1, layer_scale=None,
                             pool_size=5, mlp_ratio=2, drop_path=0.5)  # fmt: skip
    assert not [n for n, _ in model.named_parameters() if "layer_scale" in n or "head" in n]
    assert model.eval()(torch.randn(2, 1, 33, 20)).shape == (2, 8)
    assert model.network[6][0].drop_path.chance == 0.5
    scaled = tm.nn.PoolFormer((1,) * 4, (8,) * 4, layer_scale=0.25).network[4][0]
    assert scaled.layer_scale_1.tolist() == scaled.layer_scale_2.tolist() == [0.25] * 8


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.PoolFormer((1, 1)), r"depths: must be four, one for each stage; got \[1, 1"),
        (lambda: tm.nn.PoolFormer((1, 0, 1, 1)), "depths: must be 1 to 100; got 0"),
        (lambda: tm.nn.PoolFormer(channels=(0,) * 4), "channels: must be 1 to 2^24 - 1; got 0"),
        (lambda: tm.nn.PoolFormer(drop_path=1), "drop_path: must be at least 0 and below 1; got 1"),
        (lambda: tm.nn.PoolFormer((1,) * 4, (8,) * 4)(torch.zeros(1, 4, 8, 8)),
         r"x: must have shape \[B, 3, Y, X\]; got \[1, 4, 8, 8\]"),
        (lambda: tm.nn.PoolFormer((1,) * 4, (8,) * 4)(torch.zeros(1, 3, 2, 8)),
         r"x: must have at least 3 pixels a side; got \[2, 8\]"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    rule = error.replace("^", r"\^")
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.PoolFormer: {rule}"):
        call()
