"""SigmoidAttention against Ramapuram et al. 2024, sections 2 and 5, and the release
(apple/ml-sigmoid-attention at 9273b49, attention_simulator)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from literal import assert_reads_as, randomised
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm


def sigmoid_attention(w, x, *, layer):
    """Computes one sequence and one head after the other, with the matrices of weights."""
    out = []
    for sequence in x:
        n, heads = len(sequence), layer.num_heads
        q, k, v = (
            t.chunk(heads, 1)
            for t in (sequence @ w["qkv.weight"].T + w.get("qkv.bias", 0)).chunk(3, 1)
        )
        parts = []
        for h in range(heads):
            qh, kh = q[h], k[h]
            if "q_norm.weight" in w:
                width = qh.shape[1:]
                qh = F.layer_norm(qh, width, w["q_norm.weight"], w["q_norm.bias"])
                kh = F.layer_norm(kh, width, w["k_norm.weight"], w["k_norm.bias"])
            z = qh @ kh.T / math.sqrt(qh.shape[1])
            if layer.slopes is not None:
                place = torch.arange(n)
                z = z - 2.0 ** (-8 * (h + 1) / heads) * (place[:, None] - place).abs()
            if isinstance(layer.score_bias, str):
                z = z - math.log(max(n, 1))
            else:
                z = z + (w["score_bias"][h] if "score_bias" in w else layer.score_bias)
            weights = torch.sigmoid(z)
            parts.append((weights.tril() if layer.causal else weights) @ v[h])
        y = torch.cat(parts, 1) @ w["proj.weight"].T + w.get("proj.bias", 0)
        if "norm.weight" in w:
            y = F.layer_norm(y, y.shape[1:], w["norm.weight"], w["norm.bias"])
        out.append(y * w.get("gamma", 1))
    return out


def reading(layer, lengths=None):
    def literal(w, x, *_):
        sequences = x if lengths is None else x.split(lengths)
        return (torch.stack if lengths is None else torch.cat)(
            sigmoid_attention(w, sequences, layer=layer)
        )

    return literal


VISION = {"layer_scale": 1e-4, "bias": True}
LANGUAGE = {"causal": True, "hybrid_norm": True}
OPTIONS = {
    "default": {},
    "vision": VISION,
    "language": LANGUAGE,
    "learned": {"score_bias": -7.62, "learn_bias": True, "qk_norm": False},
    "alibi": {"causal": True, "alibi": True, "score_bias": -2},
}


@each_backend
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(2, 33, 24, 4), (1, 1, 6, 2)])
def test_the_equations(shape, options, backend):
    batch, tokens, dim, heads = shape
    layer = tm.nn.SigmoidAttention(dim, heads, **options, backend=backend)
    x = torch.randn(batch, tokens, dim, requires_grad=True)
    assert_reads_as(randomised(layer), reading(layer), x, backend=backend)


@each_backend
@pytest.mark.parametrize("options", [LANGUAGE, {}])
def test_packed_sequences_have_a_bias_each(options, backend):
    lengths = [5, 0, 1, 12]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    layer = tm.nn.SigmoidAttention(8, 2, **options, backend=backend)
    x = torch.randn(18, 8, requires_grad=True)
    assert_reads_as(randomised(layer), reading(layer, lengths), x, ends, backend=backend)


@each_backend
@pytest.mark.parametrize("options", [LANGUAGE, {"qk_norm": False}])
def test_queries_keys_and_values_in_one_tensor(options, backend):
    """Gradients and packed sequences are included."""
    layer = randomised(tm.nn.SigmoidAttention(24, 4, **options, backend=backend))
    layer.to(device_of(backend))
    (qkv,) = draw(backend, (2, 9, 3, 4, 6))
    w = {n: t for n, t in layer.named_parameters() if n.endswith(("k_norm.weight", "k_norm.bias"))}
    w |= {n: t for n, t in layer.named_parameters() if n.startswith("q_norm")}
    # Identity projections, so that the literal reading gets q, k and v as its input.
    flat = qkv.flatten(2)
    w |= {"qkv.weight": torch.eye(72).to(qkv), "proj.weight": torch.eye(24).to(qkv)}
    want = torch.stack(sigmoid_attention(w, flat, layer=layer))
    got = layer.attend(qkv)
    close(got.flatten(2), want)
    same_gradients(got.flatten(2), want, [qkv])
    assert torch.equal(layer.attend(flat), got)
    ends = torch.tensor([0, 9, 18], dtype=torch.int32, device=qkv.device)
    close(layer.attend(qkv.flatten(0, 1), ends), got.flatten(0, 1))
    close(layer.attend(flat.flatten(0, 1), ends), got.flatten(0, 1))
    if not options.get("qk_norm", True):
        close(tm.sigmoid_attention(*qkv.unbind(2), backend=backend), got)


def test_rows_sum_to_about_one_whatever_their_number():
    layer = tm.nn.SigmoidAttention(8, 1, qk_norm=False)
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.proj.weight.copy_(torch.eye(8))
        layer.qkv.weight[16:] = torch.eye(8)
        for tokens in (1, 10, 1000):
            out = layer(torch.ones(1, tokens, 8))
            torch.testing.assert_close(out, torch.full_like(out, tokens / (tokens + 1)))


def test_no_tokens():
    layer = tm.nn.SigmoidAttention(8, 2)
    assert layer(torch.zeros(0, 3, 8)).shape == (0, 3, 8)
    assert layer(torch.zeros(3, 0, 8)).shape == (3, 0, 8)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.SigmoidAttention(8, 2, score_bias="log"), "score_bias: must be 'neg_log"),
        (lambda: tm.nn.SigmoidAttention(8, 2, learn_bias=True), "learn_bias: requires a score_b"),
        (lambda: tm.nn.SigmoidAttention(8, 2, layer_scale=1e300), "layer_scale: must be finite in"),
        (lambda: tm.nn.SigmoidAttention(8, 2, score_bias=1e300, learn_bias=True),
         "score_bias: must be finite in float32 to be learned"),
        (lambda: tm.nn.SigmoidAttention(8, 2, causal=1), "causal: must be a bool; got 1"),
        (lambda: tm.nn.SigmoidAttention(8, 2)(torch.zeros(3, 8)),
         r"x: must have shape \[B, N, 8\]; got \[3, 8\]"),
        (lambda: tm.nn.SigmoidAttention(8, 2)(torch.zeros(1, 3, 8), torch.zeros(1)),
         r"x: must have shape \[T, 8\] with cu_seqlens; got \[1, 3, 8\]"),
        (lambda: tm.nn.SigmoidAttention(8, 2).attend(torch.zeros(1, 3, 3, 4, 2)),
         r"qkv: must have shape \[B, N, 3, 2, 4\] or \[B, N, 24\]; got \[1, 3, 3, 4, 2\]"),
        (lambda: tm.nn.SigmoidAttention(8, 2).attend(torch.zeros(3, 3, 4, 2), torch.zeros(1)),
         r"qkv: must have shape \[T, 3, 2, 4\] or \[T, 24\] with cu_seqlens; got \[3, 3, 4, 2"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.SigmoidAttention: {error}"):
        call()
