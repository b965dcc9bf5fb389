"""Literal readings of the published BiFormer in plain PyTorch, as functions of a state dict."""

from __future__ import annotations

import torch.nn.functional as F

from tokenmill.bench.bilevel_routing_attention import gathered_attention

TOPK = (1, 4, 16, None)
PARTS = 7


def part_of(w, prefix):
    return {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)}


def routed_channels_first(x, w, heads, parts, topk):
    """x [B, C, Y, X]. The output of the 1x1 convolution is zero-padded."""
    dim, size = x.shape[1], x.shape[2:]
    region = size[0] // parts, size[1] // parts
    q, k, v = F.conv2d(x, w["qkv_linear.weight"], w["qkv_linear.bias"]).chunk(3, 1)
    pool = {"kernel_size": region, "ceil_mode": True, "count_include_pad": False}
    mean_q, mean_k = (F.avg_pool2d(t, **pool).flatten(2) for t in (q, k))
    graph = (mean_q.transpose(1, 2) @ mean_k).topk(topk).indices
    split = [t.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2) for t in (q, k, v)]
    out = gathered_attention(*split, graph, region, dim**-0.5)
    out = out.permute(0, 3, 4, 1, 2).flatten(1, 2) + depthwise(v, w, "lepe.")
    return F.conv2d(out, w["output_linear.weight"], w["output_linear.bias"])


def routed_channels_last(x, w, heads, parts, topk):
    """x [B, Y, X, C]. The input is zero-padded, and regions divide the result."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % parts, 0, -height % parts))
    if "qkv.qkv.weight" in w:
        names = {"qkv.qkv.": "qkv_linear.", "wo.": "output_linear.", "lepe.": "lepe."}
        w = {new + n: t for old, new in names.items() for n, t in part_of(w, old).items()}
        w = {n: t[..., None, None] if t.dim() == 2 else t for n, t in w.items()}
    out = routed_channels_first(x.permute(0, 3, 1, 2), w, heads, parts, topk)
    return out.permute(0, 2, 3, 1)[:, :height, :width]


def last_stage(x, w, heads, local):
    """x [B, Y, X, C]. The scale uses the head dimension."""
    channels = x.shape[3]
    q, k, v = (x.flatten(1, 2) @ w["qkv.weight"].flatten(1).T).chunk(3, 2)
    split = [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    weights = (split[0] @ split[1].mT * (channels // heads) ** -0.5).softmax(-1)
    out = (weights @ split[2]).transpose(1, 2).flatten(2).view_as(x)
    pixels = x if local == "input" else v.view_as(x)
    out = out + depthwise(pixels.permute(0, 3, 1, 2), w, "lepe.").permute(0, 2, 3, 1)
    return out @ w["proj.weight"].flatten(1).T + w["proj.bias"]


def depthwise(x, w, prefix):
    weight = w[prefix + "weight"]
    padding = weight.shape[-1] // 2
    return F.conv2d(x, weight, w[prefix + "bias"], padding=padding, groups=x.shape[1])


def batch_norm(x, w, prefix):
    given = (w[prefix + n] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *given)


def convolved(x, w, prefix, **options):
    return F.conv2d(x, w[prefix + "weight"], w[prefix + "bias"], **options)


def block(x, w, topk):
    """x [B, C, Y, X]; computes channels last."""
    if "pos_embed.weight" in w:
        x = x + depthwise(x, w, "pos_embed.")
    x = x.permute(0, 2, 3, 1)
    dim = x.shape[3]
    norm1, norm2 = ((w[f"norm{i}.weight"], w[f"norm{i}.bias"]) for i in (1, 2))
    y, attn = F.layer_norm(x, (dim,), *norm1, eps=1e-6), part_of(w, "attn.")
    if topk is None:
        y = last_stage(y, attn, 8, "input")
    else:
        y = routed_channels_last(y, attn, dim // 32, PARTS, topk)
    x = x + y
    second = "mlp.3." if "mlp.3.weight" in w else "mlp.2."
    y = F.gelu(
        F.linear(F.layer_norm(x, (dim,), *norm2, eps=1e-6), w["mlp.0.weight"], w["mlp.0.bias"])
    )
    return (x + F.linear(y, w[second + "weight"], w[second + "bias"])).permute(0, 3, 1, 2)


def block_channels_first(x, w, topk):
    """x [B, C, Y, X]"""
    y, attn = batch_norm(x, w, "norm1."), part_of(w, "attn.")
    if topk is None:
        y = last_stage(y.permute(0, 2, 3, 1), attn, 8, "values").permute(0, 3, 1, 2)
    else:
        y = routed_channels_first(y, attn, x.shape[1] // 32, PARTS, topk)
    x = x + y
    return x + convolved(F.gelu(convolved(batch_norm(x, w, "norm2."), w, "mlp.0.")), w, "mlp.2.")


def downsample(x, w, prefix, swin, first):
    if swin and first:
        return batch_norm(convolved(x, w, prefix + "0.", stride=4), w, prefix + "1.")
    if swin:
        return convolved(batch_norm(x, w, prefix + "0."), w, prefix + "1.", stride=2)
    half = {"stride": 2, "padding": 1}
    x = batch_norm(convolved(x, w, prefix + "0.", **half), w, prefix + "1.")
    if not first:
        return x
    return batch_norm(convolved(F.gelu(x), w, prefix + "3.", **half), w, prefix + "4.")


def logits(x, w, depths, swin, channels_first):
    run = block_channels_first if channels_first else block
    for i, (depth, topk) in enumerate(zip(depths, TOPK, strict=True)):
        x = downsample(x, w, f"downsample_layers.{i}.", swin, i == 0)
        for j in range(depth):
            x = run(x, part_of(w, f"stages.{i}.{'blocks.' if swin else ''}{j}."), topk)
    x = batch_norm(x, w, "norm.").mean((2, 3))
    return F.linear(x, w["head.weight"], w["head.bias"])


def shapes(depths, channels, mlp_ratio, swin, channels_first):
    """Names and shapes of the published state dicts."""
    found = {}

    def affine(name, *weight):
        found[f"{name}.weight"], found[f"{name}.bias"] = weight, weight[:1]

    def norm(name, dim):
        affine(name, dim)
        found[f"{name}.running_mean"] = found[f"{name}.running_var"] = (dim,)
        found[f"{name}.num_batches_tracked"] = ()

    ones = (1, 1) if channels_first else ()
    before = None
    for i, (depth, dim, topk) in enumerate(zip(depths, channels, TOPK, strict=True)):
        down = f"downsample_layers.{i}"
        if swin and before is None:
            affine(f"{down}.0", dim, 3, 4, 4)
            norm(f"{down}.1", dim)
        elif swin:
            norm(f"{down}.0", before)
            affine(f"{down}.1", dim, before, 2, 2)
        elif before is None:
            affine(f"{down}.0", dim // 2, 3, 3, 3)
            norm(f"{down}.1", dim // 2)
            affine(f"{down}.3", dim, dim // 2, 3, 3)
            norm(f"{down}.4", dim)
        else:
            affine(f"{down}.0", dim, before, 3, 3)
            norm(f"{down}.1", dim)
        before = dim
        for j in range(depth):
            at = f"stages.{i}.{'blocks.' if swin else ''}{j}."
            if not swin:
                affine(at + "pos_embed", dim, 1, 3, 3)
            for name in ("norm1", "norm2"):
                (norm if channels_first else affine)(at + name, dim)
            affine(at + "attn.lepe", dim, 1, 5, 5)
            if topk is None:
                found[at + "attn.qkv.weight"] = (3 * dim, dim, *ones)
                affine(at + "attn.proj", dim, dim, *ones)
            else:
                affine(at + "attn." + ("qkv_linear" if channels_first else "qkv.qkv"),
                       3 * dim, dim, *ones)  # fmt: skip
                affine(at + "attn." + ("output_linear" if channels_first else "wo"),
                       dim, dim, *ones)  # fmt: skip
            affine(at + "mlp.0", mlp_ratio * dim, dim, *ones)
            affine(at + ("mlp.2" if swin else "mlp.3"), dim, mlp_ratio * dim, *ones)
    norm("norm", before)
    affine("head", 1000, before)
    return found
