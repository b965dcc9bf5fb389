"""Image models of diffusers, random and tiny, whose self-attention has fewer tokens."""

from __future__ import annotations

import copy
import itertools
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


def groups_of(x, grid, ratio, cell=2):
    """Rows of one picture that merge into one token: each of the most similar tokens merges into
    the first token of some cell."""
    columns = grid[1]
    steps = (range(0, side // cell * cell, cell) for side in grid)
    firsts = [i * columns + j for i, j in itertools.product(*steps)]
    others = [i for i in range(len(x)) if i not in firsts]
    cosine = torch.nn.functional.normalize(x, dim=-1)
    cosine = cosine @ cosine.T
    best = {i: max(firsts, key=lambda j: cosine[i, j]) for i in others}
    merged = sorted(others, key=lambda i: -cosine[i, best[i]])[: int(ratio * len(x))]
    stay = [i for i in range(len(x)) if i not in merged]
    return [[i, *(m for m in merged if best[m] == i)] for i in stay]


def whole(x, groups, out):
    result = torch.empty_like(x)
    for row, group in zip(out, groups, strict=True):
        result[group] = row
    return result


def literal(attn, x, grid, ratio):
    """Merged attention of one picture."""
    groups = groups_of(x, grid, ratio)
    out = attn(torch.stack([x[group].mean(0) for group in groups])[None])[0]
    return whole(x, groups, out)


def literal_agents(attn, x, grid, ratio, agent_ratio, cell):
    """One picture, computed as in LeapLabTHU/Agent-Attention at 207ce3e, agentsd/patch.py."""
    groups, coarse = (groups_of(x, grid, share, cell) for share in (ratio, agent_ratio))
    tokens, agents = (torch.stack([x[g].mean(0) for g in some]) for some in (groups, coarse))
    if 2 * len(agents) >= len(tokens):
        return whole(x, groups, attn(tokens[None])[0])
    parts = []
    q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    heads = zip(*(t.chunk(attn.heads, 1) for t in (q, k, v, attn.to_q(agents))), strict=True)
    for qh, kh, vh, ah in heads:
        scale = qh.shape[1] ** -0.5
        gathered = (ah @ kh.T * scale).softmax(1) @ vh
        parts.append((qh @ ah.T * scale**0.3).softmax(1) @ gathered + 0.075 * vh)
    return whole(x, groups, attn.to_out[0](torch.cat(parts, 1)))


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
    assert sizes == ({120, 30} if build is unet else {16})  # halved layers do not change
    for attn, x, out in patched:
        for b in range(2):
            finest = x.shape[1] == grid[0] * grid[1]
            expected = literal(attn, x[b], grid, 0.4) if finest else attn(x[b : b + 1])[0]
            torch.testing.assert_close(out[b], expected, rtol=1e-4, atol=1e-5)
    assert not [m for m in model.modules() if "forward" in vars(m)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("ratio", "agent_ratio", "cell"),
    [(0.4, 0.95, 4), (0.4, 0.5, 2)],  # the first 20 steps of the release, and the others
)
@pytest.mark.parametrize("build", [unet, dit])
def test_agents_without_training(build, ratio, agent_ratio, cell):
    torch.manual_seed(0)
    model, inputs, grid = build()
    for name, weight in model.named_parameters():
        if "to_q" in name or "to_k" in name:
            weight.mul_(4)
    library.patch(model, ratio, cell=(cell, cell), agent_ratio=agent_ratio)
    seen = []
    for block in model.modules():
        if hasattr(block, "attn1"):
            block.attn1.register_forward_hook(
                lambda attn, given, out: seen.append((attn, given[0], out))
            )
    model(*inputs)
    library.unpatch(model)
    checked = [s for s in seen if s[1].shape[1] == grid[0] * grid[1]]
    assert len(checked) >= 2
    for attn, x, out in checked:
        for b in range(2):
            expected = literal_agents(attn, x[b], grid, ratio, agent_ratio, cell)
            torch.testing.assert_close(out[b], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_agents_have_the_cells_of_the_merged_tokens():
    """A generator selects the destination token of each cell once for both."""
    torch.manual_seed(0)
    model, inputs, _ = unet()
    seen = []
    match = library.bipartite_match

    def spy(metric, r, **options):
        result = match(metric, r, **options)
        seen.append(result[0])
        return result

    library.patch(model, 1.0, agent_ratio=1.0, generator=torch.Generator().manual_seed(5))
    try:
        library.bipartite_match = spy
        model(*inputs)
    finally:
        library.bipartite_match = match
    assert len(seen) >= 4
    for tokens, agents in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(tokens, agents)
    assert not torch.equal(seen[0], seen[2])


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
        (model, {"agent_ratio": 1.5}, r"agent_ratio: must be 0 to 1, or None; got 1.5"),
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
