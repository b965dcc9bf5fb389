"""FocusScorer, FocusDualAttention and FocusEncoder against Focus-DETR (Zheng et al. 2023), section
3, and the release in MindSpore (linxid/Focus-DETR at 1610f23, deformable_transformer.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from literal import assert_reads_as, randomised
from tensors import each_backend

import tokenmill as tm


def linear(w, name, x):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def score_of_level(w, x):
    """Scores of one picture, [pixels, C]."""
    name = "enc_mask_predictor."
    z = F.layer_norm(x, x.shape[1:], w[name + "layer1.0.weight"], w[name + "layer1.0.bias"])
    z = F.gelu(linear(w, name + "layer1.1", z))
    half = z.shape[1] // 2
    z = torch.cat([z[:, :half], z[:, half:].mean(0).expand(len(z), -1)], 1)
    z = F.gelu(linear(w, name + "layer2.0", z))
    return linear(w, name + "layer2.4", F.gelu(linear(w, name + "layer2.2", z)))[:, 0]


def stretched(map_, size):
    """Bilinear resize with aligned corners, pixel by pixel."""
    rows = []
    for y in range(size[0]):
        v = y * (map_.shape[0] - 1) / max(size[0] - 1, 1)
        for x in range(size[1]):
            u = x * (map_.shape[1] - 1) / max(size[1] - 1, 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, map_.shape[0] - 1), min(x0 + 1, map_.shape[1] - 1)
            above = map_[y0, x0] * (1 - u + x0) + map_[y0, x1] * (u - x0)
            below = map_[y1, x0] * (1 - u + x0) + map_[y1, x1] * (u - x0)
            rows.append(above * (1 - v + y0) + below * (v - y0))
    return torch.stack(rows).view(size)


def scorer(w, *levels):
    pictures = []
    for b in range(levels[0].shape[0]):
        scores, above = [], None
        for i, level in enumerate(reversed(levels)):
            x, size = level[b].flatten(0, 1), level.shape[1:3]
            if above is not None:
                x = x + x * stretched(above, size).flatten()[:, None] * w["alpha"][i - 1]
            above = score_of_level(w, x).view(size)
            scores.insert(0, above.flatten())
        pictures.append(torch.cat(scores))
    return torch.stack(pictures)


@pytest.mark.parametrize(
    ("dim", "sizes"),
    [(256, [(4, 6), (3, 3), (2, 1), (1, 1)]), (8, [(5, 2), (7, 3)]), (4, [(3, 1)])],
)
def test_the_scores(dim, sizes):
    levels = [torch.randn(2, *size, dim, requires_grad=True) for size in sizes]
    module = randomised(tm.nn.FocusScorer(dim, len(sizes)))
    assert_reads_as(module, scorer, *levels, backend="cpu", tolerance=1e-4)


def dual_attention(w, x, positions, telling, *, heads, topk, name=""):
    """One picture; telling [w]."""
    best = torch.sort(telling, descending=True, stable=True).indices[:topk]
    tokens, places = x[best], positions[best]
    weight, bias = w[name + "attn.in_proj_weight"], w[name + "attn.in_proj_bias"]
    q, k, v = (
        (rows @ part.T + b).chunk(heads, 1)
        for rows, part, b in zip(
            (tokens + places, tokens + places, tokens), weight.chunk(3), bias.chunk(3), strict=True
        )
    )
    heads_of = zip(q, k, v, strict=True)
    out = [torch.softmax(a @ b.T / a.shape[1] ** 0.5, 1) @ c for a, b, c in heads_of]
    tokens = tokens + linear(w, name + "attn.out_proj", torch.cat(out, 1))
    width = tokens.shape[1:]
    tokens = F.layer_norm(tokens, width, w[name + "norm2.weight"], w[name + "norm2.bias"])
    x = x.clone()
    x[best] = tokens
    return x


@each_backend
@pytest.mark.parametrize(
    ("tokens", "dim", "heads", "topk"), [(310, 16, 8, 300), (7, 6, 2, 3), (2, 4, 1, 300)]
)
@pytest.mark.parametrize("ragged", [False, True])
def test_dual_attention(tokens, dim, heads, topk, ragged, backend):
    layer = randomised(tm.nn.FocusDualAttention(dim, heads, topk, backend=backend))
    x, positions = (torch.randn(2, tokens, dim, requires_grad=True) for _ in range(2))
    scores, classes = torch.randn(2, tokens), torch.randn(2, tokens, 5)
    indices = torch.arange(tokens, dtype=torch.int32).repeat(2, 1)
    indices[1, tokens // 2 :] = -1

    def literal(w, x, positions, scores, classes, indices=None):
        out = []
        for b in range(2):
            there = tokens if indices is None else int((indices[b] >= 0).sum())
            telling = classes[b, :there].max(1).values * scores[b, :there]
            first = dual_attention(w, x[b, :there], positions[b, :there], telling, heads=heads,
                                   topk=topk)  # fmt: skip
            out.append(torch.cat([first, x[b, there:]]))
        return torch.stack(out)

    inputs = (x, positions, scores, classes, *([indices] if ragged else []))
    assert_reads_as(layer, literal, *inputs, backend=backend, tolerance=5e-5)


class Layer(torch.nn.Module):
    """Stand-in for deformable attention: it sees the tokens, their positions, other rows of them,
    and data shared by all tokens."""

    def __init__(self, dim):
        super().__init__()
        self.mix = torch.nn.Linear(dim, dim)
        self.norm = torch.nn.LayerNorm(dim)

    def forward(self, tokens, positions, points, *, value):
        seen = value.mean(1, keepdim=True) + points.flatten(2).sum(2, keepdim=True)
        return self.norm(tokens + self.mix(tokens + positions + seen))


def encoder_by_hand(w, x, positions, points, scores, valid, *, encoder, heads, topk):
    """One picture after the other, layer by layer."""
    pictures, value = [], x
    for b in range(x.shape[0]):
        able = valid[b].nonzero().flatten()
        best = able[torch.sort(scores[b, able], descending=True, stable=True).indices]
        best = best[: min(int(0.5 * len(able)) + 1, len(able))]
        width = min(int(0.5 * x.shape[1]) + 1, x.shape[1])
        rows = x[b]
        for number, share in enumerate((1, 0.8, 0.6, 0.6, 0.4, 0.2)):
            mine = best[: int(share * width)]
            tokens = rows[mine]
            telling = linear(w, "class_head", tokens).max(1).values * scores[b, mine]
            tokens = dual_attention(w, tokens, positions[b, mine], telling, heads=heads, topk=topk,
                                    name=f"dual.{number}.")  # fmt: skip
            seen = value[b].mean(0) + points[b, mine].flatten(1).sum(1, keepdim=True)
            name = f"layers.{number}."
            tokens = tokens + linear(w, name + "mix", tokens + positions[b, mine] + seen)
            tokens = F.layer_norm(tokens, tokens.shape[1:], w[name + "norm.weight"],
                                  w[name + "norm.bias"])  # fmt: skip
            rows = rows.clone()
            rows[mine] = tokens
        pictures.append(rows)
    return torch.stack(pictures)


@each_backend
@pytest.mark.parametrize("padding", [0, 7])
def test_the_encoder(padding, backend):
    dim, heads, topk, tokens = 8, 2, 4, 31
    encoder = tm.nn.FocusEncoder([Layer(dim) for _ in range(6)], torch.nn.Linear(dim, 5), dim,
                                 heads, topk=topk, backend=backend)  # fmt: skip
    x, positions = (torch.randn(2, tokens, dim, requires_grad=True) for _ in range(2))
    points, scores = torch.randn(2, tokens, 4, 2), torch.randn(2, tokens)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, tokens - padding :] = False

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x, positions, points, scores, valid):
            return self.encoder(x, positions, scores, valid, points, value=x)

    def literal(w, *inputs):
        w = {name.removeprefix("encoder."): t for name, t in w.items()}
        return encoder_by_hand(w, *inputs, encoder=encoder, heads=heads, topk=topk)

    inputs = (x, positions, points, scores, valid)
    assert_reads_as(randomised(Call()), literal, *inputs, backend=backend, tolerance=2e-4)


def test_background_stays_as_it_is():
    encoder = tm.nn.FocusEncoder([Layer(4)], torch.nn.Linear(4, 2), 4, 1, ratio=0.2, cascade=[1.0])
    x = torch.randn(1, 20, 4)
    scores = torch.arange(20.0)[None]
    out = encoder(x, torch.zeros_like(x), scores, None, torch.zeros(1, 20, 1, 2), value=x)
    changed = (out != x).any(2)[0]
    assert changed.tolist() == [False] * 15 + [True] * 5


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.FocusScorer(6), "FocusScorer: dim: must be a positive multiple of 4; got 6"),
        (lambda: tm.nn.FocusScorer(4, 2)(torch.zeros(1, 2, 2, 4)),
         "FocusScorer: levels: must be 2 maps; got 1"),
        (lambda: tm.nn.FocusDualAttention(8, 2, 0), "FocusDualAttention: topk: must be positive"),
        (lambda: tm.nn.FocusDualAttention(8, 2)(
            torch.zeros(1, 3, 8), torch.zeros(1, 3, 8), torch.zeros(1, 4), torch.zeros(1, 3, 2)),
         r"FocusDualAttention: scores: must have 2 dimensions, the first two \[1, 3\]"),
        (lambda: tm.nn.FocusDualAttention(8, 2)(
            torch.zeros(1, 3, 8), torch.zeros(1, 3, 8).half(), torch.zeros(1, 3),
            torch.zeros(1, 3, 2)),
         "FocusDualAttention: positions: must have the dtype of the weights, float32; got float16"),
        (lambda: tm.nn.FocusDualAttention(8, 2)(
            torch.zeros(1, 3, 8), torch.zeros(1, 3, 8),
            torch.zeros(1, 3).to(torch.float8_e4m3fn), torch.zeros(1, 3, 2)),
         "FocusDualAttention: scores: must be float16, bfloat16 or float32; got float8_e4m3fn"),
        (lambda: tm.nn.FocusEncoder([], torch.nn.Linear(8, 2), 8),
         "FocusEncoder: layers: must be 6 modules, as cascade has shares"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.{error}"):
        call()
