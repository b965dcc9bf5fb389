"""Sparsifiner against its released code (lim142857/Sparsifiner at 9a11e26, models/sparsifiner.py),
which masks dense attention: one layer, and blocks from which tokens are dropped."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import backends, device_of
from hypothesis import given
from hypothesis import strategies as st
from tier import examples
from torch.utils.flop_counter import FlopCounterMode

import tokenmill as tm


def masked_attention(x, w, heads, keep_rate, coefficients):
    """x [B, N, C]. Ties of estimates go to the first: a stable sort."""
    batch, tokens, channels = x.shape
    qkv = x @ w["qkv.weight"].T + w["qkv.bias"]
    q, k, v = qkv.view(batch, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    low_q, low_k = (
        t @ w[f"mask_predictor.proj_c_{n}.weight"].T + w[f"mask_predictor.proj_c_{n}.bias"]
        for n, t in (("q", q), ("k", k))
    )
    cheap = low_q @ (low_k.transpose(2, 3) @ w["mask_predictor.proj_n"]) * heads**-0.5
    mixture = cheap[:, :, 1:].softmax(-1)
    if coefficients < mixture.shape[-1]:
        smallest = mixture.topk(coefficients).values[..., -1:]
        mixture = torch.where(mixture >= smallest, mixture, 0)
    basis = w["mask_predictor.proj_back_n"].T.abs()
    estimate = mixture @ torch.where(basis > 0.02, basis, 0)
    order = estimate.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(estimate, dtype=torch.bool)
    mask.scatter_(-1, order[..., : math.ceil(keep_rate * tokens)], True)
    mask = torch.cat([torch.ones_like(mask[:, :, :1]), mask], 2)
    z = (q @ k.transpose(2, 3) * (channels // heads) ** -0.5).masked_fill(~mask, -torch.inf)
    out = (z.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out @ w["proj.weight"].T + w["proj.bias"]


calls = given(
    tokens=st.integers(16, 40),
    keep_rate=st.sampled_from([0.1, 0.25, 1.0]),
    coefficients=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "triton"])
@examples(12)
@calls
def test_dense_attention_behind_a_mask(tokens, keep_rate, coefficients, seed, backend):
    check_layer(tokens, keep_rate, coefficients, seed, backend)


@pytest.mark.parametrize("backend", [b for b in backends() if b == "triton"])
@examples(2)
@calls
def test_dense_attention_behind_a_mask_on_triton(tokens, keep_rate, coefficients, seed, backend):
    check_layer(tokens, keep_rate, coefficients, seed, backend)


def check_layer(tokens, keep_rate, coefficients, seed, backend):
    g = torch.Generator().manual_seed(seed)
    layer = tm.nn.SparsifinerAttention(
        32, tokens, 2, keep_rate=keep_rate, coefficients=coefficients, backend=backend
    ).to(device_of(backend))
    with torch.no_grad():  # the threshold leaves half of the patterns: many estimates are 0
        for name, weight in layer.named_parameters():
            scale = 0.03 if "back" in name else 0.2
            weight.copy_(scale * torch.randn(weight.shape, generator=g))
    x = torch.randn(2, tokens, 32, generator=g).to(device_of(backend)).requires_grad_()
    want = masked_attention(x, dict(layer.state_dict()), 2, keep_rate, coefficients)
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    cotangent = torch.randn(want.shape, generator=g).to(x)
    grads = [torch.autograd.grad(y, x, cotangent)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def released_encoder(layers, w, x, heads, keep_rate, coefficients, rate):
    """x [B, N, C] through blocks: dropped tokens stay as rows of zeros. Returns the rows and a mask
    of active patches."""
    batch, tokens, channels = x.shape
    active = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)  # the class token too
    left = iter(range(1, 100))
    for i in range(1 + max(int(name.split(".")[1]) for name in w)):
        mine = {n.removeprefix(f"blocks.{i}."): t for n, t in w.items() if f"blocks.{i}." in n}
        gone = ~active[:, None, :, None]
        y = F.layer_norm(x, (channels,), mine["norm1.weight"], mine["norm1.bias"], eps=1e-6)
        qkv = F.linear(y, mine["attn.qkv.weight"], mine["attn.qkv.bias"])
        q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).masked_fill(gone, 0)
        low_q, low_k = (
            F.linear(t, mine[f"attn.mask_predictor.proj_c_{n}.weight"],
                     mine[f"attn.mask_predictor.proj_c_{n}.bias"]).masked_fill(gone, 0)
            for n, t in (("q", q), ("k", k))
        )  # fmt: skip
        mixture = low_q @ (low_k.mT @ mine["attn.mask_predictor.proj_n"]) * heads**-0.5
        mixture = mixture.softmax(-1)
        smallest = mixture.topk(min(coefficients, mixture.shape[-1])).values[..., -1:]
        basis = mine["attn.mask_predictor.proj_back_n"].T.abs()
        estimate = torch.where(mixture >= smallest, mixture, 0) @ torch.where(
            basis > 0.02, basis, 0
        )
        estimate = estimate.masked_fill(gone.mT, -torch.inf)
        budget = math.ceil(keep_rate * tokens)
        if not active.all():
            budget = min(budget, int(active[0].sum()) - 1)
        order = estimate.argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(estimate, dtype=torch.bool)
        mask.scatter_(-1, order[..., :budget], True)
        mask[:, :, 0] = True  # the class token attends to all tokens, including dropped ones
        z = (q @ k.mT * (channels // heads) ** -0.5).masked_fill(~mask, -torch.inf)
        a = z.softmax(-1)
        out = (a @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(out, mine["attn.proj.weight"], mine["attn.proj.bias"])
        if i in layers:
            stay = math.ceil(rate ** next(left) * (tokens - 1))
            scores = a[:, :, 0, 1:].mean(1).masked_fill(~active[:, 1:], -torch.inf)
            active = torch.zeros_like(active)
            active[:, 1:].scatter_(1, scores.topk(stay).indices, True)
            active[:, 0] = True
        y = F.layer_norm(x, (channels,), mine["norm2.weight"], mine["norm2.bias"], eps=1e-6)
        y = F.gelu(F.linear(y, mine["mlp.fc1.weight"], mine["mlp.fc1.bias"]))
        x = x + F.linear(y, mine["mlp.fc2.weight"], mine["mlp.fc2.bias"])
        x = x.masked_fill(~active[..., None], 0)
    return x, active[:, 1:]


@pytest.mark.parametrize(
    ("keep_rate", "backend"), [(0.25, b) for b in backends("reference")] + [(0.8, "reference")]
)
def test_blocks_from_which_tokens_leave(keep_rate, backend):
    torch.manual_seed(3)
    encoder = tm.nn.SparsifinerEncoder(
        16, 2, 3, num_tokens=18, layers=(0, 1), token_keep_rate=0.6, keep_rate=keep_rate,
        coefficients=2, mlp_ratio=1, backend=backend,
    ).to(device_of(backend))  # fmt: skip
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "norm" not in name:
                scale = 0.03 if "back" in name else 0.2
                weight.copy_(scale * torch.randn(weight.shape))
    x = torch.randn(2, 18, 16).to(device_of(backend)).requires_grad_()
    y, source = encoder(x)
    weights = dict(encoder.state_dict())
    whole, active = released_encoder((0, 1), weights, x, 2, keep_rate, 2, 0.6)
    assert source.shape[1] == math.ceil(0.6**2 * 17)
    assert [row.nonzero().flatten().tolist() for row in active] == source.tolist()
    rows = torch.cat([torch.zeros_like(source[:, :1]), source + 1], 1).long()
    want = whole.gather(1, rows[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(y, want, rtol=2e-4, atol=2e-4)
    cotangent = torch.randn(want.shape).to(x)
    grads = [torch.autograd.grad(t, x, cotangent)[0] for t in (y, want)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_the_experiment_sets_the_defaults():
    """sparsifiner_default_config.yaml: REDUCE_N_FACTOR 6, REDUCE_C_FACTOR 2, TOPK 8, ATTN_KEEP_RATE
    0.25, BASIS_THRESHOLD 2e-2; TOKEN_PRUNING_LOC of default_config.py."""
    for layer in (
        tm.nn.SparsifinerAttention(384, 197, 6),
        tm.nn.SparsifinerEncoder(depth=2, layers=(1,)).blocks[1].attn,
    ):
        predictor = layer.mask_predictor
        assert predictor.proj_n.shape == predictor.proj_back_n.shape == (197, 32)
        assert predictor.proj_c_q.weight.shape == predictor.proj_c_k.weight.shape == (32, 64)
        assert (predictor.coefficients, predictor.basis_threshold) == (8, 0.02)
        assert layer.budget == 50
    encoder = tm.nn.SparsifinerEncoder(depth=12, dim=48, token_keep_rate=0.7)
    assert encoder.budgets == {3: 138, 6: 97, 9: 68}
    names = {"norm1.weight", "attn.qkv.bias", "attn.proj.weight", "norm2.bias", "mlp.fc1.weight"}
    names |= {f"attn.mask_predictor.{n}" for n in ("proj_n", "proj_back_n", "proj_c_k.bias")}
    assert names <= set(encoder.blocks[0].state_dict())


def attention_operations(layer, x):
    """Operations of a layer on x, excluding the projections, which dense attention has as well."""
    _, tokens, channels = x.shape
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops() - 2 * 4 * tokens * channels**2


@torch.no_grad()
@pytest.mark.parametrize(("keep_rate", "saved"), [(0.25, 0.48), (0.1, 0.63), (0.04, 0.69)])
def test_48_to_69_percent_fewer_operations_of_attention(keep_rate, saved):
    """DeiT-S at 224 x 224: 197 tokens, 6 heads of 64 channels; attention is its two products. The
    claim counts products of nonzero coefficients and patterns. The layer is counted both ways: as
    it runs, with mixtures as dense products, and without the zeros."""
    torch.manual_seed(0)
    tokens, heads, d, low, patterns, best = 197, 6, 64, 32, 32, 8
    layer = tm.nn.SparsifinerAttention(heads * d, tokens, heads, keep_rate=keep_rate)
    x = torch.randn(1, tokens, heads * d)
    dense = 2 * heads * 2 * tokens * tokens * d
    queries, listed = tokens - 1, math.ceil(keep_rate * tokens)
    estimate = (queries + tokens) * d * low + (queries + tokens) * low * patterns
    attended = 2 * queries * listed * d + 2 * tokens * d  # lists, and the class token
    run = attention_operations(layer, x)
    compared = heads * queries * tokens  # the selection counts one per score
    assert run - compared == 2 * heads * (estimate + attended + queries * patterns * tokens)
    basis = layer.mask_predictor.proj_back_n.abs() > layer.mask_predictor.basis_threshold
    mixed = queries * best * tokens * basis.float().mean().item()  # initial weights: 32 % remain
    counted = 2 * heads * (estimate + attended + mixed)
    assert 0.31 < basis.float().mean() < 0.33
    assert 1 - counted / dense == pytest.approx(saved, abs=0.01)
    assert 1 - run / dense > saved - 0.24


@torch.no_grad()
def test_operations_of_a_vision_transformer_with_both_kinds_of_sparsity():
    """Blocks in the proportions of DeiT-S (tokens to channels, and 6 heads). The abstract's "over
    60 %" needs a rate of 0.3, at which 30, 9 and 2.7 % of the patches remain."""
    tokens, dim = 50, 96
    dense = 12 * 2 * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
    x, saved = torch.randn(1, tokens, dim), {}
    for rate in (1.0, 0.3):
        encoder = tm.nn.SparsifinerEncoder(dim, num_tokens=tokens, token_keep_rate=rate)
        with FlopCounterMode(display=False) as counter:
            _, source = encoder(x)
        assert source.shape[1] == math.ceil(rate**3 * (tokens - 1))
        saved[rate] = 1 - counter.get_total_flops() / dense
    assert 0 < saved[1.0] < 0.1 and 0.6 < saved[0.3] < 0.65


def test_the_estimate_learns_the_attention():
    torch.manual_seed(0)
    layer = tm.nn.SparsifinerAttention(16, 24, 1, reduce_tokens=2)
    x = torch.randn(4, 24, 16)
    parameters = list(layer.mask_predictor.parameters())
    optimizer = torch.optim.Adam(parameters, 0.02)
    losses = []
    for _ in range(80):
        estimate, attention = layer.approximate(x)
        loss = (estimate - attention.detach()).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_heads": 3}, "num_heads: must divide dim, 16; got 3"),
        ({"keep_rate": 0.0}, "keep_rate: must be above 0 and at most 1; got 0"),
        ({"reduce_tokens": 50}, "reduce_tokens: must be 1 to num_tokens, 20; got 50"),
        ({"reduce_channels": 9}, "reduce_channels: must be 1 to the dimension of a head, 8; got 9"),
        ({"reduce_tokens": 21}, "reduce_tokens: must be 1 to num_tokens, 20; got 21"),
        ({"coefficients": 0}, "coefficients: must be at least 1, or None; got 0"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.SparsifinerAttention: {error}"):
        tm.nn.SparsifinerAttention(16, 20, **{"num_heads": 2, **options})


def test_other_lengths_are_refused():
    layer = tm.nn.SparsifinerAttention(16, 20, 2)
    with pytest.raises(RuntimeError, match=r"x: must have shape \[B, 20, 16\]; got \[1, 21, 16\]"):
        layer(torch.zeros(1, 21, 16))


@pytest.mark.parametrize(
    ("places", "error"),
    [
        (torch.zeros(1, 20), "must have shape [B, M] with M at most 19; got [1, 20]"),
        (torch.zeros(1, 3), "must be int32 or int64; got float32"),
        (torch.zeros(2, 3).int(), "must have a row for each of x; got [2, 3]"),
    ],
)
def test_bad_places_are_refused(places, error):
    layer = tm.nn.SparsifinerAttention(16, 20, 2)
    with pytest.raises(RuntimeError) as info:
        layer(torch.zeros(1, 4, 16), places)
    assert str(info.value) == f"tokenmill.nn.SparsifinerAttention: places: {error}"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"layers": (3, 1)}, "layers: must ascend from 0 to 3 at most; got [3, 1]"),
        ({"token_keep_rate": 0.0}, "token_keep_rate: must be above 0 and at most 1; got 0"),
        ({"keep_rate": (0.5,)}, "keep_rate: must be one, or one for each of 4 blocks; got [0.5]"),
    ],
)
def test_bad_options_of_the_encoder_are_refused(options, error):
    with pytest.raises(RuntimeError) as info:
        tm.nn.SparsifinerEncoder(16, 2, 4, num_tokens=20, **{"layers": (1,)} | options)
    assert str(info.value) == f"tokenmill.nn.SparsifinerEncoder: {error}"
