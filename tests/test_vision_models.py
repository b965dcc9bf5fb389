"""Random tiny vision transformers of transformers and timm, with fewer tokens."""

from __future__ import annotations

import copy
import doctest
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tokenmill as tm

transformers = pytest.importorskip("transformers", minversion="5.24")
ours = pytest.importorskip("tokenmill.integrations.transformers")
SMALL = {
    "image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 32,
    "num_attention_heads": 3, "num_hidden_layers": 4, "initializer_range": 0.2,
}  # fmt: skip


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)), ours


def deit():
    config = transformers.DeiTConfig(**SMALL)
    model = transformers.DeiTForImageClassificationWithTeacher(config)
    torch.nn.init.normal_(model.deit.embeddings.cls_token)
    torch.nn.init.normal_(model.deit.embeddings.distillation_token)
    return model, ours


class Pooled(torch.nn.Module):
    """A backbone whose pooled features are the logits."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)

    def forward(self, images):
        return self.backbone(images).pooler_output


def dinov2(kind="Dinov2", **options):
    sizes = {name: size for name, size in SMALL.items() if name != "intermediate_size"}
    config = getattr(transformers, f"{kind}Config")(**sizes, mlp_ratio=2, **options)
    return Pooled(getattr(transformers, f"{kind}Model")(config)), ours


def of_pair(kind):
    config = getattr(transformers, f"{kind}VisionConfig")(
        **{name: size for name, size in SMALL.items() if name != "initializer_range"}
    )
    return Pooled(getattr(transformers, f"{kind}VisionModel")(config)), ours


def of_timm(**options):
    pytest.importorskip("timm")
    from timm.models import VisionTransformer

    from tokenmill.integrations import timm

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
    model = VisionTransformer(**sizes, num_classes=5, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, timm


MODELS = {
    "vit": vit,
    "deit": deit,
    "dinov2": dinov2,
    "dinov2_registers": lambda: dinov2("Dinov2WithRegisters", num_register_tokens=3),
    "clip": lambda: of_pair("CLIP"),
    "siglip": lambda: of_pair("Siglip"),
    "timm": of_timm,
    "timm_registers": lambda: of_timm(reg_tokens=4, init_values=0.5, qk_norm=True),
    "timm_mean": lambda: of_timm(global_pool="avg", class_token=False, mlp_ratio=2),
}


def logits(model, images):
    out = model(images)
    return out if isinstance(out, torch.Tensor) else out.logits


def without_positions(model):
    for name, parameter in model.named_parameters():
        if "pos" in name:
            torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("name", MODELS)
def test_merged_duplicates_are_the_model(name):
    """Equal tokens stay equal: one row weighted by their count gives the same result."""
    torch.manual_seed(0)
    model, library = MODELS[name]()
    model.eval()
    without_positions(model)
    patches = torch.randn(2, 3, 4, 4).repeat(1, 1, 4, 2)  # two kinds, eight of each
    images = torch.cat([patches, torch.randn(2, 3, 4, 8).repeat(1, 1, 4, 1)], 3)
    expected = logits(model, images)
    reduction = library.patch(model, merge=[0, 4, 2, 2])
    torch.testing.assert_close(logits(model, images), expected, rtol=1e-4, atol=1e-5)
    tokens = reduction.source.shape[1]
    assert reduction.size.shape == (2, tokens - 8)
    assert reduction.size.sum(1).tolist() == [tokens, tokens]
    front = torch.arange(reduction.prefix, dtype=torch.int32)
    assert torch.equal(reduction.source[:, : len(front)], front.expand(2, -1))
    assert (reduction.size[:, : len(front)] == 1).all()
    counts = torch.zeros_like(reduction.size)
    counts.scatter_add_(1, reduction.source.long(), torch.ones(2, tokens))
    assert torch.equal(counts, reduction.size)


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_the_bits_and_training_works(name):
    torch.manual_seed(0)
    model, library = MODELS[name]()
    images = torch.randn(2, 3, 16, 16)
    before = logits(model.eval(), images)
    reduction = library.patch(model, merge=0)
    torch.testing.assert_close(logits(model, images), before, rtol=1e-4, atol=1e-5)
    assert (reduction.size == 1).all() and reduction.size.shape == reduction.source.shape
    library.unpatch(model)
    reduction = library.patch(model.train(), merge=2)
    logits(model, images).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and "mask_token" not in n]
    assert not [n for n in missing if "pooler" not in n]
    out = torch.randn(2, reduction.size.shape[1], 3)
    assert reduction.unmerge(out).shape == (2, reduction.source.shape[1], 3)
    assert reduction.size.shape[1] == reduction.prefix + 16 - 8
    library.unpatch(model)
    assert torch.equal(logits(model.eval(), images), before)
    assert not [m for m in model.modules() if {"forward", "pool"} & {*vars(m)}]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ["vit", "timm"])
def test_keep_rate_is_that_of_the_encoder(name, fuse):
    torch.manual_seed(0)
    model, library = MODELS[name]()
    model.eval()
    encoder = tm.nn.EViTEncoder(24, 3, 4, layers=(1, 2, 3), fuse=fuse, mlp_ratio=32 / 24)
    images = torch.randn(2, 3, 16, 16)
    reduction = library.patch(model, keep_rate=0.6, fuse=fuse)
    with torch.no_grad():
        if name == "vit":
            actual = model.vit(images).last_hidden_state
            x, norm = model.vit.embeddings(images), model.vit.layernorm
            for mine, theirs in zip(encoder.blocks, model.vit.layers, strict=True):
                attn, mlp = theirs.attention, theirs.mlp
                mine.norm1, mine.norm2 = theirs.layernorm_before, theirs.layernorm_after
                three = (attn.q_proj, attn.k_proj, attn.v_proj)
                for part in ("weight", "bias"):
                    joined = torch.cat([getattr(linear, part) for linear in three])
                    getattr(mine.attn["qkv"], part).copy_(joined)
                mine.attn["proj"], mine.mlp.fc1, mine.mlp.fc2 = attn.o_proj, mlp.fc1, mlp.fc2
        else:
            encoder = tm.nn.EViTEncoder(24, 3, 4, layers=(1, 2, 3), fuse=fuse)
            encoder.blocks.load_state_dict(model.blocks.state_dict())
            actual = model.forward_features(images)
            x, norm = model._pos_embed(model.patch_embed(images)), model.norm
        y, source = encoder(x, keep_rate=0.6)
    torch.testing.assert_close(actual, norm(y), rtol=1e-4, atol=1e-5)
    assert torch.equal(reduction.source, source)


def test_keep_rate_with_a_distillation_token():
    """Only the class token chooses; the other prefix token stays after it."""
    torch.manual_seed(0)
    model, images = deit()[0].eval(), torch.randn(2, 3, 16, 16)
    seen = []
    layer = model.deit.layers[1]
    layer.layernorm_after.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    model(images)
    reduction = ours.patch(model, keep_rate=0.5, layers=[1], fuse=False)
    model(images)
    whole, kept = seen
    rows = torch.cat([torch.tensor([[0, 1]] * 2), 2 + reduction.source], 1)
    expected = whole.gather(1, rows.long()[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)
    assert reduction.source.shape == (2, 8)


def test_dropout_of_weights_and_checkpoints():
    """Dropout equals PyTorch's; a recomputed block finds the sizes of its first run."""
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL)).train()
    reduction = ours.patch(model, merge=2)
    images, grads = torch.randn(2, 3, 16, 16), []
    for again in (False, True):
        if again:
            for layer in model.layers:
                plain = layer.forward
                layer.forward = partial(checkpoint, plain, use_reentrant=False)
            found = reduction.size
        model.zero_grad()
        model(images).last_hidden_state.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)
    assert sorted(reduction._sizes) == [0, 1, 2, 3] and torch.equal(reduction.size, found)
    for layer in model.layers:
        layer.attention.attention_dropout = 0.5
    first, second = (model(images).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "timm_mean"])
def test_a_deep_copy_is_a_model_of_its_own(name):
    torch.manual_seed(0)
    model, library = MODELS[name]()
    images = torch.randn(2, 3, 16, 16)
    library.patch(model.eval(), merge=2)
    before = logits(model, images)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    changed = logits(twin, images)
    assert torch.equal(logits(model, images), before) and not torch.equal(changed, before)
    fresh = MODELS[name]()[0].eval()
    fresh.load_state_dict(twin.state_dict())
    library.patch(fresh, merge=2)
    assert torch.equal(logits(fresh, images), changed)
    library.unpatch(twin)
    assert torch.equal(logits(model, images), before)


def test_what_cannot_be_is_refused():
    model = vit()[0].eval()
    name = r"^tokenmill.integrations.transformers.patch: "
    for options, words in (
        ({}, r"merge: must be given, or keep_rate, and not both; got None"),
        (
            {"merge": 1, "keep_rate": 0.5},
            r"merge: must be given, or keep_rate, and not both; got 1",
        ),
        ({"merge": [1, 2]}, r"merge: must be one, or 4; got 2"),
        ({"merge": -1}, r"merge: must not be negative; got -1"),
        ({"merge": 1, "layers": [1]}, r"layers: requires keep_rate"),
        ({"keep_rate": 1.5}, r"keep_rate: must be above 0 and at most 1; got 1.5"),
        ({"keep_rate": 0.5, "layers": [4]}, r"layers: must be blocks from 0 to 3"),
    ):
        with pytest.raises(RuntimeError, match=name + words):
            ours.patch(model, **options)
    ours.patch(model, merge=1)
    with pytest.raises(RuntimeError, match=name + r"model: must not be patched yet; got 'ViTFor"):
        ours.patch(model, merge=1)
    with pytest.raises(RuntimeError, match=r"patch: attention_mask: must be None; got"):
        model.vit(torch.zeros(1, 3, 16, 16), attention_mask=torch.zeros(1, 17))
    with pytest.raises(RuntimeError, match=r"patch: output_attentions: must be False, as the we"):
        model.vit(torch.zeros(1, 3, 16, 16), output_attentions=True)
    with pytest.raises(RuntimeError, match=name + r"model: must have blocks with the forward of"):
        ours.patch(model.vit, merge=1)
    ours.unpatch(model)
    with pytest.raises(RuntimeError, match=r"transformers.unpatch: model: must be patched; got"):
        ours.unpatch(model)
    assert not any("forward" in vars(layer) for layer in model.vit.layers)
    two = torch.nn.ModuleList([model, vit()[0]])
    with pytest.raises(RuntimeError, match=name + r"model: must have one stack of such layers: .*"):
        ours.patch(two, merge=1)
    with pytest.raises(RuntimeError, match=name + r"model: must have layers of ViT, DeiT, DINO"):
        ours.patch(torch.nn.Identity(), merge=1)


@pytest.mark.parametrize("kind", ["Beit", "Data2VecVision"])
def test_a_bias_by_relative_position_is_named(kind):
    config = getattr(transformers, f"{kind}Config")(**SMALL, use_relative_position_bias=True)
    model = getattr(transformers, f"{kind}Model")(config)
    rule = rf"model: must have no bias by relative position, .*; got '{kind}Model with {kind}Layer'"
    with pytest.raises(RuntimeError, match=rule):
        ours.patch(model, merge=1)


def test_text_models_of_pairs_and_class_tokens_that_are_missing_are_refused():
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3}
    for kind in ("CLIP", "Siglip"):
        config = getattr(transformers, f"{kind}TextConfig")(**sizes, num_hidden_layers=2)
        with pytest.raises(RuntimeError, match=r"model: must have layers of ViT"):
            ours.patch(getattr(transformers, f"{kind}TextModel")(config), merge=1)
    with pytest.raises(RuntimeError, match=r"model: must have a class token for keep_rate"):
        ours.patch(of_pair("Siglip")[0], keep_rate=0.5)


def test_what_cannot_be_is_refused_of_timm():
    model, library = of_timm(global_pool="avg", class_token=False)
    name = r"^tokenmill.integrations.timm.patch: "
    with pytest.raises(RuntimeError, match=name + r"model: must have a class token for keep_rate"):
        library.patch(model, keep_rate=0.5)
    with pytest.raises(RuntimeError, match=name + r"model: must be a VisionTransformer; got"):
        library.patch(torch.nn.Identity(), merge=1)
    with pytest.raises(RuntimeError, match=name + r"model: must pool by its class token, by a"):
        library.patch(of_timm(global_pool="map")[0], merge=1)
    model.pool = model.pool
    with pytest.raises(RuntimeError, match=name + r"model: must have the pool of its class; got"):
        library.patch(model, merge=1)
    model.blocks[1] = torch.nn.Identity()
    with pytest.raises(RuntimeError, match=name + r"model: must have blocks Block with Attention"):
        library.patch(model, merge=1)


def test_the_example_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(ours.patch, globs={})
    assert doctest.DocTestRunner().run(example).failed == 0
