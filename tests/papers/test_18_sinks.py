"""When Attention Sink Emerges: softmax with one logit or one key more, and no normaliser."""

from __future__ import annotations

import pytest
import torch
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

B, S, H, D = 2, 21, 3, 16


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
    """The key is seen by all: the causal mask of one key more than queries leaves it visible."""
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


@pytest.mark.parametrize("kind", WEIGHTS)
@each_backend
def test_weights_without_a_normaliser(kind, backend):
    q, k, v = leaves = draw(backend, *[(B, S, H, D)] * 3)
    want = torch.einsum("bhij,bjhd->bihd", WEIGHTS[kind](logits(q, k)).tril(), v)
    got = tm.attention(q, k, v, kind=kind, causal=True, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)
