"""EViT (Liang et al. 2022) against the released blocks and schedule (youweiliang/evit at 5ca95a7,
evit.py and helpers.py)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from literal import assert_reads_as, randomised, run_examples
from tensors import each_backend

import tokenmill as tm


def block(x, w, heads, keep_rate=1.0, tokens=None, fuse=True):
    """A block with the whole attention map, which drops patches between its two halves."""
    batch, rows, channels = x.shape
    y = F.layer_norm(x, (channels,), w["norm1.weight"], w["norm1.bias"], eps=1e-6)
    qkv = F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"])
    q, k, v = qkv.view(batch, rows, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    attention = (q @ k.mT * (channels // heads) ** -0.5).softmax(-1)
    y = (attention @ v).transpose(1, 2).reshape(batch, rows, channels)
    x = x + F.linear(y, w["attn.proj.weight"], w["attn.proj.bias"])
    left = math.ceil(keep_rate * (rows - 1)) if tokens is None else tokens
    if left < rows - 1:
        scores = attention[:, :, 0, 1:].mean(1)
        kept = scores.topk(left, 1).indices
        out = []
        for picture, row, index in zip(x, scores, kept, strict=True):
            patches = picture[1:]
            rest = [j for j in range(rows - 1) if j not in index.tolist()]
            parts = [picture[:1], patches[index]]
            if fuse:
                parts.append((patches[rest] * row[rest, None]).sum(0, keepdim=True))
            out.append(torch.cat(parts))
        x = torch.stack(out)
    y = F.layer_norm(x, (channels,), w["norm2.weight"], w["norm2.bias"], eps=1e-6)
    y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
    return x + F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])


def encoder(w, x, *, heads, keep_rates, tokens=None, fuse=True):
    """keep_rates and tokens have one entry per block."""
    for i, rate in enumerate(keep_rates):
        mine = {n.removeprefix(f"blocks.{i}."): t for n, t in w.items() if f"blocks.{i}." in n}
        x = block(x, mine, heads, rate, tokens[i] if tokens else None, fuse)
    return x


class Rows(torch.nn.Module):
    """Keeps only the rows of an encoder's result, not their origins."""

    def __init__(self, encoder, **options):
        super().__init__()
        self.encoder, self.options = encoder, options

    def forward(self, x):
        return self.encoder(x, **self.options)[0]


def reading(**options):
    def literal(w, x):
        named = {n.removeprefix("encoder."): t for n, t in w.items()}
        return encoder(named, x, heads=2, **options)

    return literal


@each_backend
@pytest.mark.parametrize("fuse", [True, False])
def test_blocks_3_6_and_9_of_12(fuse, backend):
    torch.manual_seed(0)
    layers = randomised(tm.nn.EViTEncoder(16, 2, fuse=fuse, mlp_ratio=2, backend=backend))
    rates = [0.7 if i in (3, 6, 9) else 1.0 for i in range(12)]
    x = torch.randn(2, 1 + 25, 16, requires_grad=True)
    literal = reading(keep_rates=rates, fuse=fuse)
    assert_reads_as(Rows(layers), literal, x, backend=backend, tolerance=1e-4)


@each_backend
def test_a_call_has_rates_or_numbers_of_its_own(backend):
    torch.manual_seed(1)
    layers = randomised(tm.nn.EViTEncoder(16, 2, 4, layers=(1, 3), mlp_ratio=2, backend=backend))
    x = torch.randn(2, 1 + 17, 16, requires_grad=True)
    rate = 0.85
    for options, rates, tokens in (
        ({"keep_rate": rate}, [1, rate, 1, rate], None),
        ({"keep_rate": (0.5, 0.9)}, [1, 0.5, 1, 0.9], None),
        ({"tokens": (9, 3)}, [1, 1, 1, 1], (17, 9, 10, 3)),
        ({"tokens": 6, "keep_rate": rate}, [1, 1, 1, 1], (17, 6, 7, 6)),
    ):
        literal = reading(keep_rates=rates, tokens=tokens)
        assert_reads_as(Rows(layers, **options), literal, x, backend=backend, tolerance=1e-4)


@pytest.mark.parametrize(
    ("rate", "left"),
    [
        (0.9, [178, 162, 147]), (0.8, [158, 128, 104]), (0.7, [139, 99, 71]),
        (0.6, [119, 73, 45]), (0.5, [99, 51, 27]),
    ],
)  # fmt: skip
def test_patches_of_a_picture_of_224(rate, left):
    """Row counts equal the released models: kept patches and the fused one."""
    x = torch.randn(1, 197, 8)
    for number, wanted in enumerate(left):
        layers = tm.nn.EViTEncoder(8, 1, 3, layers=(0, 1, 2)[: number + 1], keep_rate=rate)
        assert layers(x)[0].shape == (1, 1 + wanted, 8)


def test_where_rows_come_from():
    """Blocks that compute nothing leave the rows unchanged."""
    layers = tm.nn.EViTEncoder(8, 1, 3, layers=(0, 2), keep_rate=0.6)
    with torch.no_grad():
        for name, weight in layers.named_parameters():
            if "proj" in name or "fc2" in name:
                weight.zero_()
    x = torch.randn(3, 1 + 20, 8)
    y, source = layers(x)
    assert source.dtype == torch.int32 and source.shape == (3, y.shape[1] - 1)
    assert bool((source[:, -1] == -1).all())
    for picture, rows, origin in zip(x, y, source.tolist(), strict=True):
        assert torch.equal(rows[0], picture[0])
        named = [(row, i) for row, i in zip(rows[1:], origin, strict=True) if i >= 0]
        assert all(torch.equal(row, picture[1 + i]) for row, i in named)
        assert len({i for _, i in named}) == len(named) >= 7


def test_all_tokens_pass_unfused():
    layer = tm.nn.EViTReorganize(tokens=9)
    x, scores = torch.randn(2, 10, 4), torch.rand(2, 9)
    assert layer(x, scores)[0] is x
    assert layer(x, scores, tokens=5)[0].shape == (2, 7, 4)
    assert layer(x, scores, keep_rate=0.5)[0].shape == (2, 7, 4)
    assert "tokens=9" in repr(layer)


def test_gradients_of_scores_are_those_of_the_fused_token():
    x, scores = torch.randn(1, 7, 4), torch.rand(1, 6, requires_grad=True)
    y, keep = tm.nn.EViTReorganize(tokens=2)(x, scores)
    (grad,) = torch.autograd.grad(y[:, -1].sum(), scores)
    wanted = x[:, 1:].sum(2)
    wanted[0, keep[0].long()] = 0
    torch.testing.assert_close(grad, wanted)


def released_rate(step, epoch, start, end, steps, base):
    if epoch < start:
        return 1
    if epoch >= end:
        return base
    done = step - steps * start
    return base + (1 - base) * (math.cos(done / (steps * (end - start)) * math.pi) + 1) * 0.5


@pytest.mark.parametrize(("start", "epochs"), [(10, 100), (0, 0), (10, 0), (3, 5)])
def test_the_schedule(start, epochs):
    steps = 7
    for step in range(0, steps * 120, 3):
        found = tm.nn.keep_rate_schedule(step, steps, 0.7, start=start, epochs=epochs)
        want = released_rate(step, step // steps, start, start + epochs, steps, 0.7)
        assert found == pytest.approx(want, abs=1e-12)


def test_weights_of_deit_load():
    layers = tm.nn.EViTEncoder(drop_path=0.1)
    assert [b.drop_path.chance for b in layers.blocks][::11] == pytest.approx([0, 0.1])
    shapes = {n: list(t.shape) for n, t in layers.state_dict().items()}
    wanted = {
        "norm1": [384], "norm2": [384], "attn.qkv": [1152, 384], "attn.proj": [384, 384],
        "mlp.fc1": [1536, 384], "mlp.fc2": [384, 1536],
    }  # fmt: skip
    assert shapes == {
        f"blocks.{i}.{name}.{kind}": shape[:1] if kind == "bias" else shape
        for i in range(12)
        for name, shape in wanted.items()
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.EViTEncoder(8, 2, layers=(3, 3)), "EViTEncoder: layers: must ascend from 0"),
        (lambda: tm.nn.EViTEncoder(8, 2, 2, layers=(0, 2)),
         "EViTEncoder: layers: must ascend from 0 to 1 at most; got [0, 2]"),
        (lambda: tm.nn.EViTEncoder(8, 2, keep_rate=(0.5,)),
         "EViTEncoder: keep_rate: must be one, or one for each of 3 layers; got [0.5]"),
        (lambda: tm.nn.EViTEncoder(8, 2)(torch.zeros(1, 5, 7)),
         "EViTEncoder: x: must have shape [B, 1 + N, 8]; got [1, 5, 7]"),
        (lambda: tm.nn.EViTEncoder(8, 2)(torch.zeros(1, 5, 8), tokens=9),
         "EViTReorganize: tokens: must be at most the number of patches, 4; got 9"),
        (lambda: tm.nn.EViTReorganize(tokens=0), "EViTReorganize: tokens: must be at least 1; got"),
        (lambda: tm.nn.keep_rate_schedule(-1, 5), "keep_rate_schedule: step: must not be negat"),
        (lambda: tm.nn.keep_rate_schedule(0, 0), "keep_rate_schedule: steps_per_epoch: must be a"),
        (lambda: tm.nn.keep_rate_schedule(0, 5, 0.0), "keep_rate_schedule: base_rate: must be ab"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError) as info:
        call()
    assert str(info.value).startswith(f"tokenmill.nn.{error}")


def test_example_of_the_schedule():
    run_examples(tm.nn.keep_rate_schedule)
