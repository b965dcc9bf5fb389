"""VTC-CLS on a CLIP vision encoder, against the release."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from tensors import every_backend

import tokenmill as tm

transformers = pytest.importorskip("transformers")


def released(maps, features, start, keep):
    """THU-MIG/VTC-CLS at e41ac9b, clip_encoder.py and llava_arch.py: sums the class token's row,
    averaged over heads, over the layers from start on except the last."""
    rows = sum(layer[:, :, 0, 1:].mean(1) for layer in maps[start:-1])
    places = rows.topk(keep).indices.sort().values
    return features[:, 1:].gather(1, places[..., None].expand(-1, -1, features.shape[2])), places


@every_backend
@pytest.mark.parametrize(("start", "keep"), [(0, 9), (3, 4), (4, 16)])
@torch.no_grad()
def test_patches_that_the_release_keeps(start, keep, backend):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
        image_size=16, patch_size=4, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config).eval().to(device_of(backend))
    for name, weight in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight.mul_(20)  # so that patches differ
    seen = []
    projections = [m for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj"))]
    for layer in projections:
        layer.register_forward_hook(lambda m, given, out: seen.append((m, out)))
    pixels = torch.randn(2, 3, 16, 16, device=device_of(backend))
    found = model(pixels, output_attentions=True, output_hidden_states=True)
    features = found.hidden_states[-2]  # mm_vision_select_layer of LLaVA
    want, places = released(found.attentions, features, start, keep)

    outputs = {m: out.unflatten(2, (4, -1)) for m, out in seen}
    attentions = [m for m in model.modules() if hasattr(m, "q_proj")]
    prune = tm.nn.ClsTokenPruning(keep, backend=backend)
    scores = [prune.scores(outputs[a.q_proj], outputs[a.k_proj]) for a in attentions[start:-1]]
    got, indices = prune(features, scores)
    assert torch.equal(indices.long(), places)
    assert torch.equal(got, want)
