"""Image models of diffusers, random and tiny, whose self-attention has fewer tokens."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
library = pytest.importorskip("tokenmill.integrations.diffusers")


def unet():
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2}
    blocks["up_block_types"] = ("CrossAttnUpBlock2D",) * 2
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=4, norm_num_groups=4, **blocks,
    )  # fmt: skip
    inputs = torch.randn(2, 4, 10, 12), 1, torch.randn(2, 5, 8)
    return model.eval(), inputs, (10, 12)


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=2, sample_size=8,
        patch_size=2, norm_num_groups=4,
    )  # fmt: skip
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 7]), torch.tensor([2, 3])
    return model.eval(), inputs, (4, 4)


def literal(attn, x, grid, ratio):
    """Of one picture: each of the most similar tokens goes into the first one of some cell."""
    rows, columns = grid
    cells = [i * columns + j for i in range(0, rows - 1, 2) for j in range(0, columns - 1, 2)]
    others = [i for i in range(len(x)) if i not in cells]
    cosine = torch.nn.functional.normalize(x, dim=-1)
    cosine = cosine @ cosine.T
    best = {i: max(cells, key=lambda j: cosine[i, j]) for i in others}
    merged = sorted(others, key=lambda i: -cosine[i, best[i]])[: int(ratio * len(x))]
    stay = [i for i in range(len(x)) if i not in merged]
    groups = [[i, *(m for m in merged if best[m] == i)] for i in stay]
    out = attn(torch.stack([x[group].mean(0) for group in groups])[None])[0]
    whole = torch.empty_like(x)
    for row, group in zip(out, groups, strict=True):
        whole[group] = row
    return whole


@torch.no_grad()
@pytest.mark.parametrize("build", [unet, dit])
def test_tokens_are_merged_around_attention(build):
    torch.manual_seed(0)
    model, inputs, grid = build()
    before = model(*inputs).sample
    library.patch(SimpleNamespace(unet=model), ratio=0.4)
    seen = []
    for block in model.modules():
        if hasattr(block, "attn1"):
            block.attn1.register_forward_hook(
                lambda attn, given, out: seen.append((attn, given[0], out))
            )
    after = model(*inputs).sample
    assert after.isfinite().all() and not torch.allclose(after, before)
    library.unpatch(SimpleNamespace(transformer=model))
    assert torch.equal(model(*inputs).sample, before)
    patched = seen[: len(seen) // 2]
    sizes = {x.shape[1] for _, x, _ in patched}
    assert sizes == ({120, 30} if build is unet else {16})  # halved layers stay as they are
    for attn, x, out in patched:
        for b in range(2):
            whole = x.shape[1] == grid[0] * grid[1]
            expected = literal(attn, x[b], grid, 0.4) if whole else attn(x[b : b + 1])[0]
            torch.testing.assert_close(out[b], expected, rtol=1e-4, atol=1e-5)
    assert not [m for m in model.modules() if "forward" in vars(m)]


@torch.no_grad()
def test_a_deep_copy_is_a_model_of_its_own():
    torch.manual_seed(0)
    model, inputs, _ = dit()
    library.patch(model)
    before = model(*inputs).sample
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    changed = twin(*inputs).sample
    assert torch.equal(model(*inputs).sample, before) and not torch.equal(changed, before)
    fresh = dit()[0]
    fresh.load_state_dict(twin.state_dict())
    library.patch(fresh)
    assert torch.equal(fresh(*inputs).sample, changed)
    library.unpatch(twin)
    assert torch.equal(model(*inputs).sample, before)


@torch.no_grad()
def test_a_ratio_of_0_and_coarse_layers():
    torch.manual_seed(0)
    model, inputs, _ = unet()
    before = model(*inputs).sample
    library.patch(model, ratio=0)
    torch.testing.assert_close(model(*inputs).sample, before, rtol=1e-4, atol=1e-5)
    library.unpatch(model)
    results = []
    for options in ({}, {"max_downsample": 2}, {"cell": (3, 1)}):
        library.patch(model, ratio=1, **options, generator=torch.Generator().manual_seed(0))
        results.append(model(*inputs).sample)
        library.unpatch(model)
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_what_cannot_be_is_refused():
    model = unet()[0]
    name = r"^tokenmill.integrations.diffusers.patch: "
    for given, options, words in (
        (object(), {}, r"pipe_or_model: must be a model, or have a unet or transformer; got 'obj"),
        (torch.nn.Identity(), {}, r"model: must have self-attention in blocks BasicTransformerBl"),
        (model, {"ratio": 1.5}, r"ratio: must be 0 to 1; got 1.5"),
        (model, {"cell": (2, 0)}, r"cell: must be \(rows, columns\), at least 1; got"),
        (model, {"max_downsample": 0}, r"max_downsample: must be at least 1; got 0"),
    ):
        with pytest.raises(RuntimeError, match=name + words):
            library.patch(given, **options)
    library.patch(model)
    with pytest.raises(RuntimeError, match=name + r"model: must not be patched yet; got"):
        library.patch(model)
    part = torch.nn.ModuleList([model])
    with pytest.raises(RuntimeError, match=name + r"model: must have blocks with the forward of"):
        library.patch(part)
    library.unpatch(model)
    with pytest.raises(RuntimeError, match=r"diffusers.unpatch: model: must be patched; got"):
        library.unpatch(model)
