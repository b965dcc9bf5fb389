"""A vision transformer and a sentence encoder with fewer tokens.

Trains a small vision transformer for a minute and a half on the handwritten digits that
scikit-learn ships, each at a random place on a noisy canvas, in patches of 4x4 pixels. Then drops
tokens without further training: nn.EViTReorganize keeps the patches that the class token attends
to, nn.TokenMerging merges similar patches. Prints accuracy and images per second against the
remaining tokens, and draws which patches EViT keeps and ToMe merges.

Then all-MiniLM-L6-v2 embeds long passages while each layer merges tokens: cosine to the embedding
of all tokens, and passages per second.

    python examples/vit_tokens.py --plot tokens.png     # needs tokenmill[bench], tokenmill[demo]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenmill as tm

CANVAS, PATCH, DIM, HEADS = 24, 4, 64, 4
DIGIT = 8  # pixels per side
DROPS = (0, 2)  # layers that drop tokens after their attention
Shorten = tm.nn.EViTReorganize | tm.nn.TokenMerging | None


def digits() -> tuple[Tensor, Tensor]:
    """Images [n, 8, 8] with values 0 to 1, and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)


def on_canvas(images: Tensor, g: torch.Generator) -> Tensor:
    """Canvases [n, CANVAS, CANVAS]: each digit at a random place in noise."""
    canvas = 0.15 * torch.rand(len(images), CANVAS, CANVAS, generator=g)
    places = torch.randint(0, CANVAS - DIGIT + 1, (len(images), 2), generator=g).tolist()
    for picture, image, (y, x) in zip(canvas, images, places, strict=True):
        picture[y : y + DIGIT, x : x + DIGIT] += image
    return canvas.clamp(max=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def attend(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x after the attention, queries and keys."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).unbind(2)
        bias = None if size is None else tm.nn.TokenMerging.attention_bias(size)
        return x + self.proj(tm.attention(q, k, v, bias=bias).flatten(2)), q, k

    def feed(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, DIM)
        self.place = nn.Parameter(0.02 * torch.randn(1, 1 + (CANVAS // PATCH) ** 2, DIM))
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, pictures: Tensor, shorten: Shorten = None) -> tuple[Tensor, Tensor, int]:
        """Logits, the final row of each patch (-1: dropped), and the number of rows."""
        patches = F.pixel_unshuffle(pictures[:, None], PATCH).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(patches), -1, -1), self.embed(patches)], 1)
        x = x + self.place
        rows = torch.arange(x.shape[1], dtype=torch.int32).expand(len(x), -1)
        size = None
        for number, block in enumerate(self.blocks):
            x, q, k = block.attend(x, size)
            if number in DROPS and isinstance(shorten, tm.nn.TokenMerging):
                x, size, rows = shorten(x, k, size, rows)
            elif number in DROPS and shorten is not None:
                x, keep = shorten(x, shorten.scores(q, k))
                rows = _rows_of_kept(rows, keep, q.shape[1])
            x = block.feed(x)
        return self.head(self.norm(x[:, 0])), rows[:, 1:], x.shape[1]


def _rows_of_kept(rows: Tensor, keep: Tensor, tokens: int) -> Tensor:
    """Renumbers rows, which refer to tokens before dropping, to the remaining tokens."""
    moved = torch.full((len(rows), tokens), -1, dtype=torch.int32)
    moved[:, 0] = 0
    place = torch.arange(1, keep.shape[1] + 1, dtype=torch.int32).expand_as(keep)
    moved.scatter_(1, keep.long() + 1, place)
    return torch.where(rows < 0, -1, moved.gather(1, rows.clamp(min=0).long()))


def train(steps: int, batch: int) -> tuple[Transformer, Tensor, Tensor]:
    """The model, and pictures and labels held out from training."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    images, labels = digits()
    order = torch.randperm(len(images), generator=g)
    images, labels = images[order], labels[order]
    held = len(images) // 5
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    start = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(held, len(images), (batch,), generator=g)
        logits, _, _ = model(on_canvas(images[chosen], g))
        loss = F.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % max(steps // 5, 1) == 0 or step == steps - 1:
            print(f"  step {step:4}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s")
    return model.eval(), on_canvas(images[:held], g), labels[:held]


@torch.inference_mode()
def evaluate(model: Transformer, pictures: Tensor, labels: Tensor) -> None:
    ways: list[tuple[str, Shorten]] = [("all tokens", None)]
    ways += [(f"EViT, keep {rate}", tm.nn.EViTReorganize(rate)) for rate in (0.9, 0.7, 0.5, 0.3)]
    ways += [(f"ToMe, r = {r}", tm.nn.TokenMerging(r)) for r in (4, 8, 12)]
    print(f"accuracy on {len(pictures)} digits, {torch.get_num_threads()} threads")
    for name, shorten in ways:
        model(pictures, shorten)
        start = time.perf_counter()
        logits, _, left = model(pictures, shorten)
        seconds = time.perf_counter() - start
        right = (logits.argmax(1) == labels).float().mean().item()
        print(f"  {name:<15} {left:4} tokens  {100 * right:5.1f} %  {len(labels) / seconds:6.0f}/s")


@torch.inference_mode()
def plot(model: Transformer, pictures: Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = pictures[:6]
    side, columns = CANVAS // PATCH, len(shown)
    kept = model(shown, tm.nn.EViTReorganize(0.5))[1] >= 0
    merged = model(shown, tm.nn.TokenMerging(12))[1]
    colours = torch.rand(1 + int(merged.max()), 3, generator=torch.Generator().manual_seed(3))
    figure, axes = plt.subplots(3, columns, figsize=(1.7 * columns, 5.4), layout="constrained")
    for column, picture in enumerate(shown):
        grown = kept[column].view(side, side).repeat_interleave(PATCH, 0)
        grown = grown.repeat_interleave(PATCH, 1)
        images: list[tuple[str, Any]] = [
            ("picture", picture),
            ("EViT keeps", torch.where(grown, picture, torch.nan)),
            ("ToMe merges", colours[merged[column].long()].view(side, side, 3)),
        ]
        for axis, (title, image) in zip(axes[:, column], images, strict=True):
            axis.set_facecolor("#c8553d")
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


class Encoder:
    """all-MiniLM-L6-v2, whose layers merge r tokens after their attention."""

    def __init__(self) -> None:
        from transformers.utils import logging

        from tokenmill.samples import models

        logging.disable_progress_bar()
        self.model, self.tokenizer = models.minilm()

    def __call__(self, tokens: Tensor, r: int) -> tuple[Tensor, int]:
        """Embeddings [B, 384] of ids [B, N], and the number of remaining tokens per passage."""
        x, size, source = self.model.embeddings(tokens), None, None
        merge = tm.nn.TokenMerging(r)
        for layer in self.model.encoder.layer:
            attention = layer.attention.self
            q, k, v = (
                part(x).unflatten(2, (attention.num_attention_heads, -1))
                for part in (attention.query, attention.key, attention.value)
            )
            bias = None if size is None else merge.attention_bias(size)
            x = layer.attention.output(tm.attention(q, k, v, bias=bias).flatten(2), x)
            x, size, source = merge(x, k, size, source)
            x = layer.output(layer.intermediate(x), x)
        assert size is not None
        mean = (size[..., None] * x).sum(1) / size.sum(1, keepdim=True)
        return F.normalize(mean, dim=1), x.shape[1]


@torch.inference_mode()
def embed(passages: int, words: int) -> None:
    from tokenmill.samples import text

    encoder = Encoder()
    texts = text.passages(passages, words)
    tokens = encoder.tokenizer(texts, truncation=True, return_tensors="pt", padding=True)
    length = int(tokens["attention_mask"].sum(1).min())
    ids = tokens["input_ids"][:, :length]  # no padding
    every, _ = encoder(ids, 0)
    print(f"MiniLM, {passages} passages of {length} tokens")
    for share in (0, 0.02, 0.04, 0.07, 0.1, 0.13):
        r = int(share * length)
        start = time.perf_counter()
        found, left = encoder(ids, r)
        seconds = time.perf_counter() - start
        cosine = (found * every).sum(1)
        print(
            f"  r = {r:2}: {left:4} tokens left, cosine {cosine.mean():.4f}, at least "
            f"{cosine.min():.4f}, {passages / seconds:.1f} passages/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200, help="of training, 64 pictures each")
    parser.add_argument("--quick", action="store_true", help="few steps and passages")
    parser.add_argument("--no-encoder", action="store_true", help="without the sentence encoder")
    parser.add_argument("--plot", type=Path, help="draw which patches are kept and merged")
    options = parser.parse_args()
    print("training on digits")
    model, pictures, labels = train(*((10, 16) if options.quick else (options.steps, 64)))
    evaluate(model, pictures, labels)
    if options.plot:
        plot(model, pictures, options.plot)
    if not options.no_encoder:
        embed(*((2, 100) if options.quick else (8, 360)))


if __name__ == "__main__":
    main()
