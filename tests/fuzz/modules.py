"""Valid calls of modules."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fuzz import reweighting
from fuzz.compositions import Make, given_by, int32, samples_of
from fuzz.guard import tensors
from fuzz.targets import Arguments, Target
from tokenmill import nn

# Modules whose products are computed by PyTorch.
PLAIN: tuple[Any, ...] = (
    nn.Pattention, nn.AgentAttention, nn.TitansMemory, nn.SigmoidAttention,
    nn.MiniMaxLightningAttention, nn.TitansMAC, nn.TitansMAG, nn.TitansMAL,
    nn.TransNormerAttention, nn.TransNormerLayer, nn.TaylorAttention, nn.WindowAttention,
    nn.TaylorWindowBlock, nn.CharacterAttention, nn.CharacterConsistencyLoss,
    nn.TokenAwarePooling, nn.EmbeddingPooling, nn.WordPooling, nn.FocusScorer,
    nn.FocusDualAttention, nn.SelectorSummary, nn.BiFormer, nn.EViTEncoder, nn.PoolFormer,
    nn.SparsifinerEncoder, nn.GatedDeltaNet, nn.KimiDeltaAttention, nn.Mamba2,
)  # fmt: skip

# Class, method, and valid arguments for both.
MODULES: tuple[tuple[type[torch.nn.Module], str, tuple[Make, ...]], ...] = (
    (nn.BiFormer, "forward", (
        lambda r: {"depths": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "head_dim": 8, "regions": 2,
                   "topk": (1, 2, 1, None), "num_classes": 3, "x": r(2, 3, 16, 24)},
    )),
    (nn.BiFormerAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "regions": 2, "topk": 2, "x": r(2, 6, 7, 16)},
        lambda r: {"dim": 16, "num_heads": 2, "regions": 3, "topk": 2, "padding": "zeros",
                   "x": r(1, 7, 6, 16)},
    )),
    (nn.AttentionLePE, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "x": r(2, 3, 4, 16), "local": "values"},
    )),
    (nn.EViTEncoder, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "depth": 3, "layers": (0, 2), "mlp_ratio": 2.0,
                   "x": r(2, 10, 16), "keep_rate": 0.6},
        lambda r: {"dim": 16, "num_heads": 2, "depth": 2, "layers": (1,), "x": r(2, 10, 16),
                   "tokens": (4,)},
    )),
    (nn.EViTReorganize, "forward", (
        lambda r: {"keep_rate": 0.6, "x": r(2, 10, 8), "scores": r(2, 9).abs()},
        lambda r: {"tokens": 5, "fuse": False, "x": r(2, 10, 8), "scores": r(2, 9).abs()},
    )),
    (nn.EViTReorganize, "scores", (
        lambda r: {"keep_rate": 0.6, "tokens": 5, "q": r(2, 10, 2, 8), "k": r(2, 10, 2, 8)},
    )),
    (nn.ClsTokenPruning, "forward", (
        lambda r: {"keep": 4, "x": r(2, 10, 8), "scores": [r(2, 9).float(), r(2, 9).float()]},
        lambda r: {"keep": 4, "x": r(2, 10, 8), "scores": r(2, 9).float()},
    )),
    (nn.ClsTokenPruning, "scores", (
        lambda r: {"keep": 4, "q": r(2, 10, 2, 8), "k": r(2, 10, 2, 8), "scale": 0.3},
    )),
    (nn.ExpeditedBlocks, "forward", (
        lambda r: {"blocks": [torch.nn.Identity()] * 3, "start": 1, "end": 2, "grid": (2, 3),
                   "preset": "sam", "x": r(1, 43, 8), "shape": (6, 7)},
        lambda r: {"blocks": [torch.nn.Identity()] * 2, "start": 1, "end": None, "grid": 2,
                   "prefix": 0, "partition": 4, "x": r(1, 6, 7, 8)},
    )),
    (nn.ExpeditedBlocks, "features", (
        lambda r: {"blocks": [torch.nn.Identity()] * 3, "start": 1, "end": None, "grid": 2,
                   "x": r(1, 43, 8), "layers": (0, 2), "shape": (6, 7)},
    )),
    (nn.TokenClustering, "forward", (
        lambda r: {"grid": (2, 3), "x": r(1, 7, 8, 8)},
        lambda r: {"grid": 2, "preset": "sam", "iters": 2, "x": r(1, 7, 8, 8)},
    )),
    (nn.TokenReconstruction, "forward", (
        lambda r: {"k": 3, "x": r(1, 5, 6, 8), "centroids": r(1, 2, 3, 8),
                   "clusters": r(1, 2, 3, 4)},
    )),
    (nn.DToPExit, "forward", (
        lambda r: {"keep": 2, "x": r(2, 11, 8), "probabilities": r(2, 11, 3).sigmoid(),
                   "active": r.bools(2, 11)},
    )),
    (nn.FocusSelect, "forward", (
        lambda r: {"ratio": 0.4, "scores": r(2, 13), "valid": r.bools(2, 13)},
    )),
    (nn.FocusSelect, "layer", (lambda r: {"indices": r.ints(9, 2, 5), "number": 1},)),
    (nn.FocusSelect, "gather", (
        lambda r: {"xs": (r(2, 9, 4), r(2, 9, 2)), "indices": r.ints(9, 2, 5)},
    )),
    (nn.FocusSelect, "scatter", (
        lambda r: {"tokens": r(2, 3, 4), "indices": int32(1, 3, 5, 0, 2, 8).view(2, 3),
                   "base": r(2, 9, 4)},
    )),
    (nn.AgentAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "grid": (8, 7), "x": r(2, 56, 16)},
    )),
    (nn.SigmoidAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "x": r(2, 9, 16), "causal": True},
        lambda r: {"dim": 16, "num_heads": 2, "x": r(9, 16), "cu_seqlens": int32(0, 4, 9),
                   "max_seqlen": 5, "layer_scale": 1e-4, "learn_bias": True, "score_bias": -3.0},
    )),
    (nn.SigmoidAttention, "attend", (
        lambda r: {"dim": 16, "num_heads": 2, "qkv": r(2, 9, 3, 2, 8)},
        lambda r: {"dim": 16, "num_heads": 2, "qkv": r(9, 48), "cu_seqlens": int32(0, 4, 9),
                   "max_seqlen": 5},
    )),
    (nn.MiniMaxLightningAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "layer": 1, "num_layers": 4, "x": r(2, 9, 16)},
    )),
    (nn.GatedDeltaNet, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "head_dim": 8, "x": r(2, 9, 16)},
        lambda r: {"dim": 16, "num_heads": 2, "num_v_heads": 2, "head_dim": 8, "head_v_dim": 4,
                   "conv_kernel": 3, "x": r(9, 16), "cu_seqlens": int32(0, 4, 9)},
    )),
    (nn.KimiDeltaAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "head_dim": 8, "x": r(2, 9, 16)},
        lambda r: {"dim": 16, "num_heads": 2, "head_dim": 8, "x": r(9, 16),
                   "cu_seqlens": int32(0, 4, 9)},
    )),
    (nn.Mamba2, "forward", (
        lambda r: {"dim": 16, "head_dim": 8, "state_size": 8, "x": r(2, 9, 16)},
        lambda r: {"dim": 16, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 2,
                   "bias": True, "time_step_limit": (0.01, 0.1), "x": r(9, 16),
                   "cu_seqlens": int32(0, 4, 9)},
    )),
    (nn.TitansMemory, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "chunk_size": 4, "x": r(2, 9, 16)},
        lambda r: {"dim": 16, "num_heads": 2, "chunk_size": 4, "x": r(1, 6, 16), "depth": 2,
                   "expansion": 2},
    )),
    (nn.TitansMemory, "recall", (
        lambda r: {"dim": 16, "num_heads": 2, "x": r(2, 9, 16)},
        lambda r: {"dim": 16, "num_heads": 2, "x": r(1, 6, 16), "depth": 2, "expansion": 2},
    )),
    (nn.TitansMAC, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "segment": 4, "persistent": 2, "x": r(1, 9, 16)},
        lambda r: {"dim": 16, "num_heads": 2, "segment": 4, "retrieved": "segment",
                   "x": r(1, 6, 16), "return_state": True},
    )),
    (nn.TitansMAG, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "window": 4, "persistent": 2, "x": r(1, 9, 16)},
    )),
    (nn.TitansMAL, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "window": 4, "persistent": 2, "x": r(1, 9, 16),
                   "return_state": True},
    )),
    (nn.TransNormerAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "layer": 0, "num_layers": 4, "x": r(2, 9, 16)},
    )),
    (nn.TransNormerLayer, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "layer": 1, "num_layers": 4, "glu_dim": 8,
                   "x": r(2, 9, 16), "return_state": True},
    )),
    (nn.TaylorAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "feature_dim": 4, "x": r(2, 9, 16)},
    )),
    (nn.WindowAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "window": 4, "x": r(2, 9, 16)},
    )),
    (nn.TaylorWindowBlock, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "feature_dim": 4, "window": 4, "mlp_dim": 8,
                   "x": r(2, 9, 16), "return_state": True},
    )),
    (nn.CharacterAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "grid": (2, 5), "x": r(2, 10, 16)},
        lambda r: {"dim": 16, "num_heads": 2, "grid": (2, 5), "x": r(2, 10, 16),
                   "distance": "manhattan", "qkv_bias": True},
    )),
    (nn.CharacterConsistencyLoss, "forward", (
        lambda r: {"num_classes": 5, "dim": 8, "features": r(2, 7, 8),
                   "targets": r.ints(5, 2, 7) - 1},
    )),
    (nn.TokenAwarePooling, "forward", (
        lambda r: {"dim": 8, "num_scales": 3, "x": r(2, 5, 6, 8)},
    )),
    (nn.AttentionDiversificationLoss, "forward", (
        lambda r: {"threshold": 1.5, "maps": (r(2, 7, 7).sigmoid(), r(2, 5, 5).sigmoid())},
    )),
    (nn.EmbeddingPooling, "forward", (
        lambda r: {"dim": 16, "method": "attention", "num_latents": 4, "num_heads": 2,
                   "head_dim": 8, "x": r(2, 9, 16), "mask": r.bools(2, 9)},
        lambda r: {"dim": 16, "method": "mean", "x": r(9, 16), "cu_seqlens": int32(0, 4, 9)},
    )),
    (nn.WordPooling, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "num_layers": 1, "prefix": 2, "dim_feedforward": 16,
                   "x": r(9, 16), "offsets": int32(0, 3, 4, 9)},
    )),
    (nn.FocusScorer, "forward", (
        lambda r: {"dim": 16, "num_levels": 2, "levels": (r(2, 4, 4, 16), r(2, 2, 2, 16))},
    )),
    (nn.FocusDualAttention, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "topk": 5, "x": r(2, 9, 16),
                   "positions": r(2, 9, 16), "scores": r(2, 9), "classes": r(2, 9, 3)},
    )),
    (nn.SelectorSummary, "forward", (
        lambda r: {"dim": 16, "num_selectors": 4, "num_tasks": 2, "x": r(2, 9, 16)},
    )),
    (nn.Pattention, "forward", (
        lambda r: {"in_features": 8, "out_features": 4, "num_tokens": 6, "x": r(2, 5, 8)},
    )),
    (nn.PoNetMixing, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "x": r(2, 9, 16), "segments": r.ints(4, 2, 9) - 1},
    )),
    (nn.PoolFormerMixing, "forward", (
        lambda r: {"pool_size": 3, "x": r(1, 5, 6, 8)},
        lambda r: {"pool_size": 5, "channels_first": True, "x": r(1, 8, 5, 6)},
    )),
    (nn.PoolFormer, "forward", (
        lambda r: {"depths": (1,) * 4, "channels": (8,) * 4, "num_classes": 3,
                   "x": r(1, 3, 20, 16)},
    )),
    (nn.SegmentPooling, "forward", (
        lambda r: {"prefix": 2, "x": r(11, 8), "offsets": int32(0, 4, 9, 11)},
        lambda r: {"reduce": "mean", "x": r(11, 8), "offsets": int32(0, 4, 9, 11)},
    )),
    (nn.SegmentPooling, "insert", (
        lambda r: {"prefix": 2, "x": r(11, 8), "offsets": int32(0, 4, 9, 11),
                   "words": r(3, 2, 8)},
    )),
    (nn.SparsifinerAttention, "forward", (
        lambda r: {"dim": 16, "num_tokens": 17, "num_heads": 2, "x": r(1, 17, 16)},
        lambda r: {"dim": 16, "num_tokens": 17, "num_heads": 2, "x": r(1, 6, 16),
                   "places": int32(0, 3, 4, 9, 15)[None]},
    )),
    (nn.SparsifinerAttention, "attend", (
        lambda r: {"dim": 16, "num_tokens": 17, "num_heads": 2, "x": r(1, 17, 16)},
    )),
    (nn.SparsifinerEncoder, "forward", (
        lambda r: {"dim": 16, "num_heads": 2, "depth": 2, "num_tokens": 17, "layers": (0,),
                   "token_keep_rate": 0.5, "x": r(1, 17, 16)},
    )),
    (nn.TokenMerging, "forward", (
        lambda r: {"r": 3, "x": r(2, 11, 8), "metric": r(2, 11, 2, 4)},
    )),
    *reweighting.MODULES,
)  # fmt: skip


def modules() -> list[Target]:
    found = []
    for kind, method, makes in MODULES:
        made = tuple(inspect.signature(kind.__init__).parameters)[1:]
        parameters = inspect.signature(getattr(kind, method)).parameters
        called = tuple(parameters)[1:]
        stars = [n for n, p in parameters.items() if p.kind == p.VAR_POSITIONAL]

        def run(
            arguments: Arguments,
            backend: str | None,
            kind: Any = kind,
            method: str = method,
            called: tuple[str, ...] = called,
            star: str | None = stars[0] if stars else None,
        ) -> Any:
            options = {k: v for k, v in arguments.items() if k not in called}
            if "backend" in inspect.signature(kind.__init__).parameters:
                options.setdefault("backend", backend)
            inputs = {k: v for k, v in arguments.items() if k in called}
            module = kind(**options)
            for value in tensors(inputs):  # parameters in the dtype of the input
                if value.dtype in (torch.float16, torch.bfloat16):
                    module = module.to(value.dtype)
            several = inputs.pop(star, ()) if star else ()
            several = several if isinstance(several, tuple | list) else (several,)
            return getattr(module, method)(*several, **inputs)

        name = f"nn.{kind.__name__}" + ("" if method == "forward" else f".{method}")
        known = (*made, *called)
        products = kind in PLAIN or kind in reweighting.PLAIN
        found.append(Target(name, run, samples_of(makes), given_by, known, products=products))
    return found
