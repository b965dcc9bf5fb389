"""WordPooling against a literal reading of Learn Your Tokens (Thawani et al. 2023), section 2."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from literal import assert_reads_as, randomised
from tensors import each_backend

import tokenmill as tm


def word_pooling(w, x, offsets, pool):
    """Computes one word after the other, and one head after the other."""
    ends, words = offsets.tolist(), []
    for begin, end in itertools.pairwise(ends):
        characters = x[begin:end][: pool.max_length]
        rows = torch.cat([w["prefix_rows"], characters])
        rows = rows + w["positions"][: len(rows)]
        for i in range(len(pool.layers)):
            name = f"layers.{i}."
            qkv = rows @ w[name + "self_attn.in_proj_weight"].T + w[name + "self_attn.in_proj_bias"]
            heads = [t.chunk(pool.num_heads, 1) for t in qkv.chunk(3, 1)]
            out = [torch.softmax(q @ k.T / q.shape[1] ** 0.5, 1) @ v
                   for q, k, v in zip(*heads, strict=True)]  # fmt: skip
            out = torch.cat(out, 1) @ w[name + "self_attn.out_proj.weight"].T
            rows = norm(w, name + "norm1.", rows + out + w[name + "self_attn.out_proj.bias"])
            wide = torch.relu(rows @ w[name + "linear1.weight"].T + w[name + "linear1.bias"])
            out = wide @ w[name + "linear2.weight"].T + w[name + "linear2.bias"]
            rows = norm(w, name + "norm2.", rows + out)
        words.append(rows[: pool.prefix])
    return torch.stack(words)


def norm(w, name, rows):
    return F.layer_norm(rows, rows.shape[1:], w[name + "weight"], w[name + "bias"])


def packed(lengths, dim):
    return (torch.randn(sum(lengths), dim, requires_grad=True),
            torch.tensor([0, *lengths]).cumsum(0).int())  # fmt: skip


@each_backend
@pytest.mark.parametrize(
    ("lengths", "dim", "heads", "layers", "prefix", "maximum"),
    [
        ([3, 12, 7, 1, 15], 16, 4, 2, 4, 12),  # paper's sizes except channels; one word too long
        ([5, 0, 0, 2], 6, 1, 1, 1, 3),
        ([1], 4, 2, 3, 2, 1),
    ],
)
def test_the_equations(lengths, dim, heads, layers, prefix, maximum, backend):
    pool = tm.nn.WordPooling(dim, heads, layers, prefix, max_length=maximum, dim_feedforward=20,
                             backend=backend)  # fmt: skip
    x, offsets = packed(lengths, dim)
    literal = lambda w, x, offsets: word_pooling(w, x, offsets, pool)  # noqa: E731
    assert_reads_as(randomised(pool), literal, x, offsets, backend=backend, tolerance=5e-5)


def test_words_do_not_depend_on_each_other_or_on_what_no_word_has():
    pool = randomised(tm.nn.WordPooling(8, 2, 2, 2, max_length=4, dim_feedforward=9))
    x, offsets = packed([3, 6, 2], 8)
    words = pool(x, offsets)
    with torch.no_grad():
        other = x.clone()
        other[7:] = torch.nan  # beyond the fourth character of word 1, and word 2
        other[9:] = 0.0
    assert torch.equal(pool(other, offsets)[:2], words[:2])
    (gradient,) = torch.autograd.grad(words.sum(), x)
    assert (gradient[7:9] == 0).all() and torch.isfinite(gradient).all()
    middle = pool(x, offsets[1:])  # rows before the first word and after the last are not read
    torch.testing.assert_close(middle, words[1:], rtol=1e-5, atol=1e-6)
    assert pool(x, offsets[:1]).shape == (0, 2, 8)
    assert pool(x[:0], torch.zeros(3, dtype=torch.int32)).shape == (2, 2, 8)


def test_rows_for_the_decoder():
    """Prefix rows of a word are the language model's output for the previous word."""
    pool = randomised(tm.nn.WordPooling(4, 1, 1, 2, max_length=3, dim_feedforward=8))
    x, offsets = packed([2, 5, 1], 4)
    made = torch.randn(3, 2, 4)
    rows, ends = pool.decoder_input(x, offsets, made)
    assert ends.tolist() == [0, 4, 9, 12]
    want = []
    for word in range(3):
        begin, end = offsets[word : word + 2].tolist()
        characters = x[begin:end][:3]
        place = pool.positions[: 2 + len(characters)]
        first = made[word - 1] if word else pool.prefix_rows + place[:2]
        want.append(torch.cat([first, characters + place[2:]]) + place)
    torch.testing.assert_close(rows[:12], torch.cat(want))


def test_takes_the_layers_of_torch():
    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2,
        enable_nested_tensor=False,
    )  # fmt: skip
    pool = tm.nn.WordPooling(8, 2, 2, 3, dim_feedforward=12)
    pool.load_state_dict(encoder.state_dict(), strict=False)
    x, offsets = packed([5, 5], 8)
    padded = torch.cat([pool.prefix_rows.expand(2, -1, -1), x.view(2, 5, 8)], 1)
    want = encoder(padded + pool.positions[:8])[:, :3]
    torch.testing.assert_close(pool(x, offsets), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.WordPooling(8, 3), "num_heads: must divide dim, 8; got 3"),
        (lambda: tm.nn.WordPooling(8, 2, prefix=0), "prefix: must be 1 to"),
        (lambda: tm.nn.WordPooling(8, 2)(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int32)),
         r"x: must have shape \[T, 8\]; got \[3, 4\]"),
        (lambda: tm.nn.WordPooling(8, 2)(torch.zeros(3, 8), torch.zeros(2)),
         "offsets: must be int32; got float32"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.WordPooling: {error}"):
        call()
