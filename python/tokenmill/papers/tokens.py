"""Papers on keeping, merging and dropping tokens."""

from __future__ import annotations

from functools import partial

from .paper import BACKENDS, IMPORTS, PLAIN, Paper

Row = partial(Paper, family="tokens", backends=BACKENDS)
ROWS = (
    Row(
        number=1,
        name="EViT",
        title=(
            "Not All Patches are What You Need: Expediting Vision Transformers via Token "
            "Reorganizations"
        ),
        authors="Liang et al.",
        arxiv="2202.07800",
        computes=(
            "the patches that the class token attends to most, and the others as one: sum_j a_j x_j"
        ),
        call=(
            "tokenmill.nn.EViTReorganize(keep_rate=0.7)",
            "tokenmill.nn.EViTEncoder(layers=(3, 6, 9), keep_rate=0.7)",
            "tokenmill.nn.keep_rate_schedule(base_rate=0.7, start=10, epochs=100)",
            "tokenmill.gather_fuse",
        ),
        test=(
            "tests/papers/test_01_evit.py",
            "tests/tokens/test_gather_fuse.py",
        ),
        example="examples/vit_tokens.py",
        checked="released code: youweiliang/evit at 5ca95a7",
        claim="DeiT-S: 50 % more images/s at -0.3 % top-1, keep rate 0.7",
        measured=(
            "gather_fuse of 64 x 197 x 768, 0.7 of the patches: 10.9 times as fast as eager PyTorch"
        ),
        note="the fused token is a sum, not divided by its weights",
        keywords=(
            "token pruning",
            "token reorganization",
            "prune patches",
            "keep rate",
            "fused token",
            "token merging",
            "class token",
            "vision transformer",
            "ViT",
            "DeiT",
            "ImageNet",
            "classification",
            "inattentive tokens",
        ),
        snippet=IMPORTS
        + """\
x = torch.randn(2, 197, 64)  # a class token and 14 x 14 patches
encoder = tm.nn.EViTEncoder(64, 4, layers=(3, 6, 9), keep_rate=0.7)
rows, source = encoder(x)
print(rows.shape[1])  # 72
""",
    ),
    Row(
        number=3,
        name="MULTI-LANE",
        title=(
            "Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-"
            "Incremental Learning"
        ),
        authors="De Min et al.",
        arxiv="2405.15633",
        computes=(
            "softmax(S x^T / sqrt(C)) x: learned selectors S against raw patches, one "
            "head of C = 768"
        ),
        call=("tokenmill.nn.SelectorSummary(dim=768, num_selectors=20)",),
        test=("tests/papers/test_3_selector_summary.py",),
        backends=PLAIN,
        checked="released code: tdemin16/multi-lane at 5ee982c",
        claim="the best multi-label class-incremental learning",
        note="plain PyTorch: heads of 768 channels are wider than the kernels, selectors are few",
        keywords=(
            "patch selectors",
            "summarize patch tokens",
            "token summarization",
            "drop-and-replace",
            "class-incremental learning",
            "multi-label",
            "continual learning",
            "cross-attention",
            "prompt",
        ),
        snippet=IMPORTS
        + """\
layer = tm.nn.SelectorSummary(dim=64, num_selectors=4, num_tasks=3)
print(layer(torch.randn(2, 197, 64)).shape)  # torch.Size([3, 2, 4, 64])
""",
    ),
    Row(
        number=7,
        name="VTC-CLS",
        title="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
        authors="Wang et al.",
        arxiv="2412.05819",
        computes=(
            "the k patches with the largest attention of the class token, averaged over"
            " heads and summed over layers, in the order of the image"
        ),
        call=("tokenmill.nn.ClsTokenPruning(keep=64)",),
        test=(
            "tests/papers/test_07_vtc_cls.py",
            "tests/tokens/test_partition.py",
        ),
        checked="released code: THU-MIG/VTC-CLS at e41ac9b",
        claim=(
            "the best answers of LLaVA at 64 to 192 of 576 image tokens without training, "
            "and faster inference"
        ),
        measured="topk_partition of 64 x 196, k = 137: 2.2 times as fast as torch.topk",
        note=(
            "on a CLIP encoder of transformers (random weights), layers start to the last "
            "but one, as the release takes them; features are those of the last but one "
            "layer"
        ),
        keywords=(
            "visual token compression",
            "token pruning",
            "MLLM",
            "multimodal",
            "LLaVA",
            "CLIP",
            "class token",
            "CLS",
            "training-free",
            "vision language model",
            "image tokens",
            "prune",
        ),
        snippet=IMPORTS
        + """\
prune = tm.nn.ClsTokenPruning(keep=4)
scores = [prune.scores(*torch.randn(2, 1, 17, 2, 8)) for _ in range(3)]
patches, indices = prune(torch.randn(1, 17, 16), scores)
print(patches.shape, indices)
""",
    ),
    Row(
        number=29,
        name="Expedit",
        title="Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
        authors="Liang et al.",
        arxiv="2210.01035",
        computes=(
            "soft k-means in windows of a map, and each token back as a combination of "
            "its k nearest clusters"
        ),
        call=(
            "tokenmill.nn.ExpeditedBlocks(preset='segmenter')",
            "tokenmill.nn.TokenClustering(preset='sam')",
            "tokenmill.nn.TokenReconstruction(preset='sam', norm='l2')",
            "tokenmill.cluster_tokens",
            "tokenmill.reconstruct_tokens",
        ),
        test=(
            "tests/papers/test_29_expedit.py",
            "tests/tokens/test_cluster_tokens.py",
            "tests/tokens/test_reconstruct_tokens.py",
        ),
        checked="released code: Expedit-LargeScale-Vision-Transformer/Expedit-SAM at 75a1c30",
        measured=(
            "cluster_tokens, 64 x 64 to 32 x 32, C = 192: 11.5 times as fast as the "
            "masked matrix of all pairs; reconstruct_tokens, 4096 of 1024: 1.9 times as"
            " cdist, topk, gather"
        ),
        keywords=(
            "token clustering",
            "token merging",
            "superpixels",
            "k-means",
            "token reconstruction",
            "dense prediction",
            "without fine-tuning",
            "segmentation",
            "SAM",
            "Segmenter",
            "depth estimation",
            "detection",
            "vision transformer",
            "ViT",
        ),
        snippet=IMPORTS
        + """\
x = torch.randn(1, 16, 16, 32)
centres, *_ = tm.cluster_tokens(x, (8, 8), tau=0.01, window=5)
flat = [t.flatten(1, 2) for t in (x, centres, centres)]
back, *_ = tm.reconstruct_tokens(*flat, k=4, tau=0.01)
print(back.shape)  # torch.Size([1, 256, 32])
""",
    ),
    Row(
        number=31,
        name="Focus-DETR",
        title="Less is More: Focus Attention for Efficient DETR",
        authors="Zheng et al.",
        arxiv="2307.12612",
        computes=(
            "the best tokens of each picture, fewer in each layer, gathered, processed "
            "and put back; within a layer, attention among the 300 best"
        ),
        call=(
            "tokenmill.nn.FocusSelect(ratio=0.5, cascade=(1.0, 0.8, 0.6, 0.6, 0.4, 0.2))",
            "tokenmill.nn.FocusEncoder(topk=300, ratio=0.5)",
            "tokenmill.nn.FocusScorer",
            "tokenmill.nn.FocusDualAttention(topk=300)",
        ),
        test=(
            "tests/papers/test_31_focus_detr.py",
            "tests/tokens/test_nn_stages.py",
            "tests/tokens/test_gather_tokens.py",
        ),
        checked="released code: linxid/Focus-DETR at 1610f23",
        claim="50.4 AP (+2.2)",
        keywords=(
            "object detection",
            "DETR",
            "foreground tokens",
            "token selection",
            "token pruning",
            "dual attention",
            "encoder",
            "top-k tokens",
            "multi-scale",
            "scatter",
            "COCO",
        ),
        snippet=IMPORTS
        + """\
focus, x = tm.nn.FocusSelect(ratio=0.5), torch.randn(2, 100, 16)
layer = focus.layer(focus(torch.rand(2, 100)), 2)
(tokens,) = focus.gather((x,), layer)
print(tokens.shape)  # torch.Size([2, 30, 16])
""",
    ),
    Row(
        number=39,
        name="DToP",
        title="Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
        authors="Tang et al.",
        arxiv="2308.01045",
        computes=(
            "active tokens whose likeliest class is above a threshold leave, but the 5 "
            "surest active ones of each class"
        ),
        call=(
            "tokenmill.nn.DToPExit(threshold=0.9, keep=5)",
            "tokenmill.mask_partition",
            "tokenmill.scatter_tokens",
        ),
        test=(
            "tests/tokens/test_nn_stages.py",
            "tests/papers/test_39_dtop.py",
            "tests/tokens/test_partition.py",
        ),
        checked="released code: zbwxp/Dynamic-Token-Pruning at 2baefff",
        claim="20 to 35 % fewer operations without a loss of accuracy",
        counted=(
            "tests/papers/test_39_dtop.py counts the operations of the 12 blocks of "
            "ViT-B (in its proportions of tokens to channels, exits after blocks 6 and "
            "8): 21 % fewer if 27 % of the tokens leave at the first exit and 42 % by "
            "the second, 34 % fewer at 47 % and 72 %"
        ),
        note=(
            "the segmentation heads are the caller's; a whole vision transformer with both "
            "exits is compared with the release in tests/papers/test_39_dtop.py, and is on "
            "docs/vit.md; tokens that have left are 0 there with scatter_tokens(..., (B, "
            "N)), as in the release"
        ),
        keywords=(
            "token pruning",
            "early exit",
            "semantic segmentation",
            "vision transformer",
            "ViT",
            "dynamic",
            "drop tokens",
            "prune",
            "confidence",
            "ADE20K",
            "dense prediction",
            "prune tokens",
            "segmentation",
        ),
        snippet=IMPORTS
        + """\
leave = tm.nn.DToPExit(threshold=0.9, keep=2)
x, p = torch.randn(1, 16, 8), torch.full((1, 16, 3), 0.95)
first = leave(x, p)  # at the first exit
second = leave(x, p, first.active)  # at the next one: active tokens only
print(first.active.sum().item(), second.active.sum().item())
""",
    ),
)
