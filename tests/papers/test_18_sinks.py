"""When Attention Sink Emerges: softmax with one more logit or one more key, and without a
normalizer, against the released code (sail-sg/Attention-Sink at af49727, lit_gpt/model_kv_bias.py
and model_attn_sim.py, where normalized weights are divided by their sum and 1e-8)."""

from __future__ import annotations

import pytest
import torch
from each import each_backend
from tensors import close, draw, same_gradients

import tokenmill as tm

B, S, H, D = 1, 13, 3, 16


def logits(q, k):
    return torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5


def causal(z):
    return z.masked_fill(torch.ones_like(z, dtype=torch.bool).triu(1), -torch.inf)


@each_backend
def test_a_logit_more_takes_weight_and_has_no_value(backend):
    q, k, v, sink = leaves = draw(backend, *[(B, S, H, D)] * 3, (H,))
    z = torch.cat([sink[None, :, None, None].expand(B, H, S, 1), causal(logits(q, k))], -1)
    want = torch.einsum("bhij,bjhd->bihd", z.softmax(-1)[..., 1:], v)
    got = tm.attention(q, k, v, sink=sink, causal=True, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)


@each_backend
def test_a_learnable_key_and_value_in_front(backend):
    """All queries see the key: the causal mask with one key more than queries leaves it visible."""
    q, k, v, key, value = leaves = draw(backend, *[(B, S, H, D)] * 3, (H, D), (H, D))
    z = torch.cat([torch.einsum("bihd,hd->bhi", q, key)[..., None] * D**-0.5,
                   causal(logits(q, k))], -1)  # fmt: skip
    p = z.softmax(-1)
    want = torch.einsum("bhij,bjhd->bihd", p[..., 1:], v)
    want = want + p[..., 0].transpose(1, 2)[..., None] * value
    front = (t.expand(B, 1, H, D) for t in (key, value))
    keys, values = (torch.cat([f, t], 1) for f, t in zip(front, (k, v), strict=True))
    got = tm.attention(q, keys, values, causal=True, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)


WEIGHTS = {
    "sigmoid": torch.sigmoid,
    "elu1": lambda z: torch.where(z > 0, z + 1, z.exp()),
}


@pytest.mark.parametrize("normalize", [None, "sum"])
@pytest.mark.parametrize("kind", WEIGHTS)
@each_backend
def test_weights_without_a_softmax(kind, normalize, backend):
    q, k, v = leaves = draw(backend, *[(B, S, H, D)] * 3)
    weights = WEIGHTS[kind](logits(q, k)).tril()
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
    want = torch.einsum("bhij,bjhd->bihd", weights, v)
    got = tm.attention(q, k, v, kind=kind, normalize=normalize, causal=True, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)
