"""EmbeddingPooling against Pooling And Attention (Tang and Yang 2024) and its release
(yixuantt/PoolingAndAttn at 57791d5, pooling_layers/)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from literal import assert_reads_as, randomised
from tensors import each_backend

import tokenmill as tm


def latents_over(w, rows, heads):
    """Attention of the latents over the rows [M, C] of one text, one head after the other."""
    width = rows.shape[1:]
    h = F.layer_norm(rows, width, w["norm.weight"], w["norm.bias"])
    latents = F.layer_norm(w["latents"], width, w["norm_context.weight"], w["norm_context.bias"])
    k, v = (h @ w["to_kv.weight"].T).chunk(2, 1)
    parts = []
    for qh, kh, vh in zip(
        *(t.chunk(heads, 1) for t in (latents @ w["to_q.weight"].T, k, v)), strict=True
    ):
        parts.append(torch.softmax(qh @ kh.T / qh.shape[1] ** 0.5, 1) @ vh)
    z = torch.cat(parts, 1) @ w["to_out.weight"].T + w["latents"]
    n = F.layer_norm(z, width, w["ff_norm.weight"], w["ff_norm.bias"])
    value, gate = (n @ w["ff_in.weight"].T + w["ff_in.bias"]).chunk(2, 1)
    z = z + (value * F.gelu(gate)) @ w["ff_out.weight"].T + w["ff_out.bias"]
    return z.mean(0)


def embedding(w, layers, pool):
    """Embedding of one text; layers: list of [tokens, C]."""
    if pool.method == "attention":
        y = latents_over(w, layers[0], pool.num_heads)
    else:
        rows = [x.mean(0) if pool.method == "mean" else x[-1] for x in layers]
        rows = [x if len(layer) else x.new_zeros(pool.dim)
                for x, layer in zip(rows, layers, strict=True)]  # fmt: skip
        y = rows[0]
        if pool.layers is not None:
            y = latents_over(w, torch.stack(rows) + w["pos_emb.weight"], pool.num_heads)
    return y / y.norm() if pool.normalize else y


def reading(pool, lengths=None):
    def literal(w, x, mask=None, ends=None):
        layers = [x] if pool.layers is None else list(x)
        if lengths is not None:
            texts = zip(*(layer.split(lengths) for layer in layers), strict=True)
        else:
            seen = torch.ones(layers[0].shape[:2], dtype=torch.bool) if mask is None else mask
            texts = ([layer[b, seen[b]] for layer in layers] for b in range(len(seen)))
        return torch.stack([embedding(w, text, pool) for text in texts])

    return literal


SMALL = {"num_latents": 5, "num_heads": 2, "head_dim": 7}
POOLS = {
    "last": {"method": "last"},
    "mean": {"method": "mean", "normalize": False},
    "attention": {"method": "attention"} | SMALL,
    "last of layers": {"method": "last", "layers": 3} | SMALL,
    "mean of layers": {"method": "mean", "layers": 3} | SMALL,
}


@each_backend
@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("masked", [False, True])
def test_padded_texts(options, masked, backend):
    pool = randomised(tm.nn.EmbeddingPooling(6, **options, backend=backend))
    shape = (3, 9, 6) if pool.layers is None else (pool.layers, 3, 9, 6)
    x = torch.randn(shape, requires_grad=True)
    mask = torch.arange(9) < torch.tensor([[9], [1], [4]])
    mask[2] = mask[2].flip(0)  # left padding
    inputs = (x, mask) if masked else (x,)
    assert_reads_as(pool, reading(pool), *inputs, backend=backend, tolerance=5e-5)


@each_backend
@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_packed_texts(options, backend):
    lengths = [4, 1, 8]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    pool = randomised(tm.nn.EmbeddingPooling(6, **options, backend=backend))
    shape = (13, 6) if pool.layers is None else (pool.layers, 13, 6)
    x = torch.randn(shape, requires_grad=True)
    assert_reads_as(pool, reading(pool, lengths), x, None, ends, backend=backend, tolerance=5e-5)


@pytest.mark.parametrize("layers", [None, 4])
def test_heads_as_wide_as_published(layers):
    """32 heads of 2048, computed by PyTorch; few channels and latents keep the test small."""
    method = "attention" if layers is None else "mean"
    pool = tm.nn.EmbeddingPooling(4, method, layers, num_latents=3)
    assert (pool.num_heads, pool.to_q.out_features) == (32, 32 * 2048)
    x = torch.randn((2, 5, 4) if layers is None else (layers, 2, 5, 4), requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    assert_reads_as(randomised(pool), reading(pool), x, mask, backend="cpu", tolerance=5e-5)


@pytest.mark.parametrize("head_dim", [8, 300])
def test_a_text_without_tokens(head_dim):
    mask = torch.tensor([[False] * 3, [True] * 3])
    for method in ("last", "mean"):
        y = tm.nn.EmbeddingPooling(4, method)(torch.randn(2, 3, 4), mask)
        assert (y[0] == 0).all() and y[1].norm() > 0.99
        assert (tm.nn.EmbeddingPooling(4, method)(torch.randn(2, 0, 4), mask[:, :0]) == 0).all()
    pool = tm.nn.EmbeddingPooling(
        4, "attention", num_latents=2, num_heads=1, head_dim=head_dim, normalize=False
    )
    y = pool(torch.full((2, 3, 4), 7.0), mask)
    none = pool(torch.zeros(1, 0, 4))
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:1], none)


def test_published_names_load():
    pool = tm.nn.EmbeddingPooling(4, "mean", 3, **SMALL)
    names = {
        "cross_attend_blocks.0.norm": "norm", "cross_attend_blocks.0.norm_context": "norm_context",
        "cross_attend_blocks.0.fn.to_q": "to_q", "cross_attend_blocks.0.fn.to_kv": "to_kv",
        "cross_attend_blocks.0.fn.to_out": "to_out", "cross_attend_blocks.1.norm": "ff_norm",
        "cross_attend_blocks.1.fn.net.0": "ff_in", "cross_attend_blocks.1.fn.net.2": "ff_out",
    }  # fmt: skip
    back = {ours: theirs for theirs, ours in names.items()}
    published = {}
    for name, value in pool.state_dict().items():
        module, _, kind = name.rpartition(".")
        published[f"{back[module]}.{kind}" if module in back else name] = value + 1
    assert set(published) >= {"latents", "pos_emb.weight", "cross_attend_blocks.1.fn.net.2.bias"}
    pool.load_state_dict(published)
    assert torch.equal(pool.ff_out.bias, published["cross_attend_blocks.1.fn.net.2.bias"])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.EmbeddingPooling(4, "eos"), "method: must be 'last', 'mean' or 'attention'"),
        (lambda: tm.nn.EmbeddingPooling(4, "attention", 3), "layers: must be positive, and req"),
        (lambda: tm.nn.EmbeddingPooling(4, layers=3, **SMALL)(torch.zeros(2, 1, 2, 4)),
         "x: must be of 3 layers"),
        (lambda: tm.nn.EmbeddingPooling(4)(torch.zeros(2, 4)), r"x: must have shape \[B, N, 4\]"),
        (lambda: tm.nn.EmbeddingPooling(4)(torch.zeros(2, 3, 4), torch.ones(2, 3)),
         "mask: must be bool; got float32"),
        (lambda: tm.nn.EmbeddingPooling(4, "attention", num_latents=1, num_heads=1)(
            torch.zeros(2, 4), cu_seqlens=torch.tensor([0, 2]).int()),
         "head_dim: must be at most 256 for packed texts; got 2048"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.EmbeddingPooling: {error}"):
        call()
