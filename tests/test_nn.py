"""Every module of tokenmill.nn: compiled at two lengths, under autocast, and copied."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tokenmill as tm
from tokenmill import nn


def randn(*shape):
    return torch.randn(shape, requires_grad=True)


def segments(n):
    return torch.arange(n, dtype=torch.int32).expand(2, n) // 3


def offsets(n):
    return torch.tensor([0, 3, 4, n], dtype=torch.int32)


class Positioned(torch.nn.Linear):
    """A layer that uses tokens and their positions."""

    def forward(self, tokens, positions):
        return tokens + super().forward(tokens + positions)


def poolformer():
    model = nn.PoolFormer((1,) * 4, (16,) * 4, num_classes=5, layer_scale=1)
    for name, weight in model.named_parameters():
        # The mixer removes a constant: the gradient of this bias is 0 except for rounding.
        weight.requires_grad_("norm1.bias" not in name)
    return model.eval()


@dataclass
class Case:
    """A module and its arguments at length n."""

    make: Any
    inputs: Any
    lengths: tuple[int, int] = (16, 24)


CASES = {
    "AgentAttention": Case(
        lambda: nn.AgentAttention(16, 2, grid=(4, 2), agents=2),
        lambda n: (randn(n // 8, 8, 16),),  # its length is fixed
    ),
    "AttentionDiversificationLoss": Case(
        nn.AttentionDiversificationLoss, lambda n: (torch.rand(2, n, n, requires_grad=True),)
    ),
    "AttentionLePE": Case(lambda: nn.AttentionLePE(32, 4), lambda n: (randn(1, n, 8, 32),)),
    "AttentionLePE, values": Case(
        lambda: nn.AttentionLePE(32, 4, local="values", qkv_bias=True),
        lambda n: (randn(1, n, 8, 32),),
    ),
    "BiFormer": Case(
        lambda: nn.BiFormer((1,) * 4, (16,) * 4, head_dim=8, regions=2, topk=(1, 2, 1, None),
                            num_classes=5).eval(),
        lambda n: (randn(2, 3, n, 32),),
        (48, 48),  # its attentions are compiled at two lengths separately
    ),
    "BiFormerAttention": Case(
        lambda: nn.BiFormerAttention(32, 4, regions=2, topk=2), lambda n: (randn(1, n, 8, 32),)
    ),
    "BiFormerAttention, zeros": Case(
        lambda: nn.BiFormerAttention(32, 4, regions=2, topk=2, padding="zeros"),
        lambda n: (randn(1, n, 8, 32),),
    ),
    "BiFormerAttention, input": Case(
        lambda: nn.BiFormerAttention(32, 4, regions=2, topk=2, padding="input"),
        lambda n: (randn(1, n, 8, 32),),
    ),
    "CharacterAttention": Case(
        lambda: nn.CharacterAttention(16, 2, grid=(2, 4)),
        lambda n: (randn(n // 8, 8, 16),),  # its length is fixed
    ),
    "CharacterConsistencyLoss": Case(
        lambda: nn.CharacterConsistencyLoss(5, 16),
        lambda n: (randn(2, n, 16), torch.arange(2 * n).view(2, n) % 5),
    ),
    "ClsTokenPruning": Case(
        lambda: nn.ClsTokenPruning(8), lambda n: (randn(2, 1 + n, 8), torch.rand(2, n))
    ),
    "DToPExit": Case(
        lambda: nn.DToPExit(0.5, 1), lambda n: (randn(2, n, 8), torch.rand(2, n, 3))
    ),
    "EViTEncoder": Case(
        lambda: nn.EViTEncoder(16, 2, 3, layers=(0, 2)).eval(), lambda n: (randn(2, 1 + n, 16),)
    ),
    "EViTReorganize": Case(
        nn.EViTReorganize, lambda n: (randn(2, 1 + n, 8), torch.rand(2, n, requires_grad=True))
    ),
    "EmbeddingPooling": Case(
        lambda: nn.EmbeddingPooling(16, "attention", num_latents=4, num_heads=2, head_dim=8),
        lambda n: (randn(2, n, 16), torch.arange(n) < torch.tensor([[n], [4]])),
    ),
    "EmbeddingPooling, layers": Case(
        lambda: nn.EmbeddingPooling(16, "last", 3, num_latents=4, num_heads=2, head_dim=8),
        lambda n: (randn(3, 2, n, 16), torch.arange(n) < torch.tensor([[n], [4]])),
    ),
    "ExpeditedBlocks": Case(
        lambda: nn.ExpeditedBlocks([torch.nn.Linear(16, 16) for _ in range(3)], 1, 2, 4, prefix=0),
        lambda n: (randn(1, n, 8, 16),),
    ),
    "ExpeditedBlocks, windows": Case(
        lambda: nn.ExpeditedBlocks([torch.nn.Linear(16, 16) for _ in range(3)], 1, 2, 3, prefix=0,
                                   partition=5),
        lambda n: (randn(1, n, 8, 16),),
    ),
    "FocusDualAttention": Case(
        lambda: nn.FocusDualAttention(16, 2, topk=5),
        lambda n: (randn(2, n, 16), randn(2, n, 16), torch.rand(2, n), torch.rand(2, n, 3)),
    ),
    "FocusEncoder": Case(
        lambda: nn.FocusEncoder([Positioned(16, 16)], torch.nn.Linear(16, 3), 16, 2, topk=5,
                                cascade=[0.5]),
        lambda n: (randn(2, n, 16), randn(2, n, 16), torch.rand(2, n), torch.rand(2, n) < 0.8),
    ),
    "FocusScorer": Case(
        lambda: nn.FocusScorer(16, 2), lambda n: (randn(2, n, 4, 16), randn(2, n // 2, 2, 16))
    ),
    "FocusSelect": Case(nn.FocusSelect, lambda n: (torch.rand(2, n), torch.rand(2, n) < 0.8)),
    "GatedDeltaNet": Case(
        lambda: nn.GatedDeltaNet(16, 2, head_dim=16), lambda n: (randn(2, n, 16),)
    ),
    "KimiDeltaAttention": Case(
        lambda: nn.KimiDeltaAttention(16, 2, 8), lambda n: (randn(2, n, 16),)
    ),
    "Mamba2": Case(
        lambda: nn.Mamba2(16, head_dim=8, state_size=8), lambda n: (randn(2, n, 16),)
    ),
    "Mamba2, groups": Case(
        lambda: nn.Mamba2(16, head_dim=8, state_size=8, n_groups=2), lambda n: (randn(2, n, 16),)
    ),
    "MiniMaxLightningAttention": Case(
        lambda: nn.MiniMaxLightningAttention(16, 2, layer=1, num_layers=4),
        lambda n: (randn(2, n, 16),),
    ),
    "Pattention": Case(lambda: nn.Pattention(16, 8, 6), lambda n: (randn(2, n, 16),)),
    "PoNetMixing": Case(lambda: nn.PoNetMixing(32, 4), lambda n: (randn(2, n, 32), segments(n))),
    "PoolFormer": Case(
        poolformer,
        lambda n: (randn(2, 3, n, 32),),
        (48, 48),  # its mixer is compiled at two lengths separately
    ),
    "PoolFormerMixing": Case(nn.PoolFormerMixing, lambda n: (randn(1, n, 8, 16),)),
    "PoolFormerMixing, channels first": Case(
        lambda: nn.PoolFormerMixing(channels_first=True), lambda n: (randn(1, 16, n, 8),)
    ),
    "PromptTokenPool": Case(
        lambda: nn.PromptTokenPool(16, 8, match="nearest"),
        lambda n: (randn(2, n, 16), torch.arange(2 * n).view(2, n) % 3 > 0),
    ),
    "SegmentPooling": Case(
        lambda: nn.SegmentPooling(prefix=2), lambda n: (randn(n, 8), offsets(n))
    ),
    "SegmentPooling, mean": Case(
        lambda: nn.SegmentPooling("mean"), lambda n: (randn(n, 8), offsets(n))
    ),
    "SelectorSummary": Case(
        lambda: nn.SelectorSummary(16, 4, 2), lambda n: (randn(2, n, 16).detach(),)
    ),
    "SigmoidAttention": Case(
        lambda: nn.SigmoidAttention(16, 2, layer_scale=1e-4),
        lambda n: (randn(2, n, 16),),
    ),
    "SigmoidAttention, learned bias": Case(
        lambda: nn.SigmoidAttention(16, 2, causal=True, score_bias=-3, learn_bias=True, alibi=True),
        lambda n: (randn(2, n, 16),),
    ),
    "SparsifinerAttention": Case(
        lambda: nn.SparsifinerAttention(32, num_tokens=16, num_heads=2),
        lambda n: (randn(n // 8, 16, 32),),  # its length is fixed
    ),
    "SparsifinerEncoder": Case(
        lambda: nn.SparsifinerEncoder(32, 2, 2, num_tokens=16, layers=(0,), token_keep_rate=0.5),
        lambda n: (randn(n // 8, 16, 32),),  # its length is fixed
    ),
    "TaylorAttention": Case(
        lambda: nn.TaylorAttention(16, 2, 4), lambda n: (randn(2, n, 16),)
    ),
    "TaylorWindowBlock": Case(
        lambda: nn.TaylorWindowBlock(16, 2, feature_dim=4, window=5), lambda n: (randn(2, n, 16),)
    ),
    "TitansMAC": Case(
        lambda: nn.TitansMAC(16, 2, segment=4), lambda n: (randn(2, n, 16),), (6, 7)
    ),
    "TitansMAG": Case(
        lambda: nn.TitansMAG(16, 2, window=5), lambda n: (randn(2, n, 16),), (3, 4)
    ),
    "TitansMAL": Case(
        lambda: nn.TitansMAL(16, 2, window=5), lambda n: (randn(2, n, 16),), (3, 4)
    ),
    "TitansMemory": Case(
        lambda: nn.TitansMemory(16, 2, chunk_size=4), lambda n: (randn(2, n, 16),), (3, 4)
    ),
    "TitansMemory, deep": Case(
        lambda: nn.TitansMemory(16, 2, depth=2, expansion=2, chunk_size=10),
        lambda n: (randn(2, n, 16),),
    ),
    "TokenAwarePooling": Case(
        lambda: nn.TokenAwarePooling(16), lambda n: (randn(2, n, 8, 16),)
    ),
    "TokenClustering": Case(lambda: nn.TokenClustering(4), lambda n: (randn(1, n, 8, 16),)),
    "TokenMerging": Case(
        lambda: nn.TokenMerging(5), lambda n: (randn(2, n, 16), randn(2, n, 2, 8))
    ),
    "TokenReconstruction": Case(
        nn.TokenReconstruction,
        lambda n: (randn(1, n, 8, 16), randn(1, 4, 4, 16), randn(1, 4, 4, 16)),
    ),
    "TransNormerAttention": Case(
        lambda: nn.TransNormerAttention(16, 2, layer=0, num_layers=3),
        lambda n: (randn(2, n, 16),),
    ),
    "TransNormerLayer": Case(
        lambda: nn.TransNormerLayer(16, 2, layer=1, num_layers=3), lambda n: (randn(2, n, 16),)
    ),
    "WindowAttention": Case(
        lambda: nn.WindowAttention(16, 2, window=5), lambda n: (randn(2, n, 16),)
    ),
    "WordPooling": Case(
        lambda: nn.WordPooling(16, 2, prefix=2, dim_feedforward=16),
        lambda n: (randn(n, 16), offsets(n)),
    ),
}  # fmt: skip
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


NAMES = [name for name in CASES if "," not in name]


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def test_every_module_is_here():
    public = {name: getattr(nn, name) for name in nn.__all__}
    modules = {n for n, v in public.items() if isinstance(v, type) and hasattr(v, "forward")}
    assert modules == set(NAMES)


@pytest.mark.parametrize("case", [CASES[n] for n in NAMES], ids=NAMES)
def test_compiles_as_one_graph_at_any_length(case):
    module = case.make()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for length in case.lengths:  # dynamic from the second length on
        inputs = case.inputs(length)
        for found, wanted in zip(outputs(compiled(*inputs)), outputs(module(*inputs)), strict=True):
            assert torch.equal(found, wanted)


@each
def test_trains_under_autocast(case):
    """Gradients equal float32 gradients up to bfloat16 rounding, and have the dtypes of their
    parameters."""
    torch.manual_seed(0)
    module, inputs = case.make(), case.inputs(case.lengths[0])
    leaves = [t for t in (*module.parameters(), *inputs) if t.requires_grad]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = outputs(module(*inputs))[0]
        if not out.is_floating_point():
            return
        # Not uniform: the output of a layer norm has a constant sum.
        cotangent = torch.linspace(0.5, 1.5, out.numel()).view_as(out).to(out.dtype)
        grads = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
        results.append([out, *grads])
    for leaf, grad in zip(leaves, results[1][1:], strict=True):
        assert grad is None or grad.dtype == leaf.dtype
    for wanted, found in zip(*results, strict=True):
        assert (wanted is None) == (found is None)
        # If two tokens are nearly equal, the other one may be the maximum.
        assert wanted is None or (found - wanted).norm() <= 0.1 * wanted.norm()


@each
def test_copies_are_the_same_module(case):
    module, inputs = case.make(), case.inputs(case.lengths[0])
    wanted = outputs(module(*inputs))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for a, b in zip(outputs(other(*inputs)), wanted, strict=True):
            assert torch.equal(a, b)


def test_layers_under_autocast_beside_what_stayed_float32():
    x = torch.randn(1, 8, 8, 16)
    layer = torch.nn.Linear(16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clusters = nn.TokenClustering(4)(x)
        out = nn.TokenReconstruction()(x, clusters, layer(clusters))
        stage = nn.DToPExit(0.5, 1)(x[0], torch.rand(8, 8, 3))
        back = tm.scatter_tokens(layer(stage.tokens), stage.indices, x[0])
        focus = nn.FocusSelect()
        chosen = focus.layer(focus(torch.rand(8, 8)), 1)
        (tokens,) = focus.gather((x[0],), chosen)
        written = focus.scatter(layer(tokens), chosen, x[0])
        y, size, _ = nn.TokenMerging(2)(x[0], layer(x[0]).unflatten(2, (2, 8)))
        q = layer(y).unflatten(2, (2, 8))
        attended = tm.attention(q, q, q, bias=nn.TokenMerging.attention_bias(size))
    assert {t.dtype for t in (out, back, written, y)} == {torch.float32}
    assert attended.dtype == torch.bfloat16
