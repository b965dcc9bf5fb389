"""Papers on tokens that are kept, merged or dropped."""

from __future__ import annotations

from .paper import BACKENDS, PLAIN, Paper

ROWS = (
    Paper(
        number=1,
        name="EViT",
        title=(
            "Not All Patches are What You Need: Expediting Vision Transformers via Token "
            "Reorganizations"
        ),
        authors="Liang et al.",
        arxiv="2202.07800",
        family="tokens",
        computes=(
            "the patches that the class token attends to most, and the others as one: sum_j a_j x_j"
        ),
        call=(
            "tokenmill.nn.EViTReorganize(keep_rate=0.7)",
            "tokenmill.nn.EViTEncoder(layers=(3, 6, 9), keep_rate=0.7)",
            "tokenmill.nn.keep_rate_schedule(base_rate=0.7, start=10, epochs=100)",
            "tokenmill.gather_fuse",
        ),
        test=("tests/papers/test_01_evit.py",),
        example="examples/vit_tokens.py",
        backends=BACKENDS,
        claim="DeiT-S: 50 % more images/s at -0.3 % top-1, keep rate 0.7",
        measured=(
            "gather_fuse of 64 x 197 x 768, 0.7 of the patches: 10.9 times as fast as eager PyTorch"
        ),
        note="the fused token is a sum, not divided by its weights",
    ),
    Paper(
        number=3,
        name="MULTI-LANE",
        title=(
            "Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-"
            "Incremental Learning"
        ),
        authors="De Min et al.",
        arxiv="2405.15633",
        family="tokens",
        computes=(
            "softmax(S x^T / sqrt(C)) x: learned selectors S against raw patches, one "
            "head of C = 768"
        ),
        call=("tokenmill.nn.SelectorSummary(dim=768, num_selectors=20)",),
        test=("tests/papers/test_3_selector_summary.py",),
        backends=PLAIN,
        claim="the best multi-label class-incremental learning",
        note="plain PyTorch: heads of 768 channels are wider than the kernels, selectors are few",
    ),
    Paper(
        number=7,
        name="VTC-CLS",
        title="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
        authors="Wang et al.",
        arxiv="2412.05819",
        family="tokens",
        computes=(
            "the k patches with the largest attention of the class token, summed over "
            "layers, in the order of the image"
        ),
        call=("tokenmill.nn.ClsTokenPruning(keep=64)",),
        test=("tests/tokens/test_nn_class_token.py",),
        backends=BACKENDS,
        measured="topk_partition of 64 x 196, k = 137: 2.2 times as fast as torch.topk",
    ),
    Paper(
        number=29,
        name="Expedit",
        title="Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
        authors="Liang et al.",
        arxiv="2210.01035",
        family="tokens",
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
        test=("tests/papers/test_29_expedit.py",),
        backends=BACKENDS,
        measured=(
            "cluster_tokens, 64 x 64 to 32 x 32, C = 192: 11.5 times as fast as the "
            "masked matrix of all pairs; reconstruct_tokens, 4096 of 1024: 1.9 times as"
            " cdist, topk, gather"
        ),
    ),
    Paper(
        number=31,
        name="Focus-DETR",
        title="Less is More: Focus Attention for Efficient DETR",
        authors="Zheng et al.",
        arxiv="2307.12612",
        family="tokens",
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
        test=("tests/papers/test_31_focus_detr.py",),
        backends=BACKENDS,
        claim="50.4 AP (+2.2)",
    ),
    Paper(
        number=39,
        name="DToP",
        title="Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
        authors="Tang et al.",
        arxiv="2308.01045",
        family="tokens",
        computes=(
            "tokens whose likeliest class is above a threshold leave, but the 5 surest "
            "of each class"
        ),
        call=(
            "tokenmill.nn.DToPExit(threshold=0.9, keep=5)",
            "tokenmill.mask_partition",
            "tokenmill.scatter_tokens",
        ),
        test=("tests/tokens/test_nn_stages.py",),
        backends=BACKENDS,
        claim="20 to 35 % fewer operations",
    ),
)
