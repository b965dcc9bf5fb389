"""Papers on sparse and long-context attention."""

from __future__ import annotations

from .paper import BACKENDS, Paper

ROWS = (
    Paper(
        number=6,
        name="Landmark Attention",
        title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
        authors="Mohtashami and Jaggi",
        arxiv="2305.16300",
        family="sparse",
        computes=(
            "a grouped softmax: the tokens of an earlier block share the weight of its "
            "landmark; in decoding, the topk blocks whose landmarks score highest, from"
            " a dense or paged cache"
        ),
        call=(
            "tokenmill.landmark_attention(block=64)",
            "tokenmill.landmark_decode(block=64)",
        ),
        test=("tests/sparse/test_landmark_attention.py",),
        backends=BACKENDS,
        claim="LLaMA-7B with a context of 32k, and fewer tokens retrieved",
        note="pays in decoding; landmark_attention is exact, and 3 to 19 % slower than causal",
    ),
    Paper(
        number=9,
        name="CCA",
        title="Core Context Aware Attention for Long Context Language Modeling",
        authors="Chen et al.",
        arxiv="2412.12465",
        family="sparse",
        computes=(
            "attention to a window and to a core of each group before it, weighted as "
            "the last query of the group weighs its tokens"
        ),
        call=(
            "tokenmill.core_context_attention(group=16, window=256)",
            "tokenmill.sparse.CoreContextState",
        ),
        test=("tests/sparse/test_core_context_attention.py",),
        backends=BACKENDS,
        note="the paper leaves open where the window begins",
    ),
    Paper(
        number=10,
        name="Sparsifiner",
        title=(
            "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient "
            "Vision Transformers"
        ),
        authors="Wei et al.",
        arxiv="2303.13755",
        family="sparse",
        computes="attention of each token to the tokens with the largest low-rank estimate of it",
        call=("tokenmill.nn.SparsifinerAttention(keep_rate=0.25, coefficients=8)",),
        test=("tests/sparse/test_sparsifiner.py",),
        backends=BACKENDS,
        claim=(
            "48 to 69 % fewer operations of attention at a loss of 0.4 % or less, above 60"
            " % if tokens are dropped too"
        ),
        note="not faster than dense attention on a CPU unless lists are short: docs/sparse.md",
    ),
    Paper(
        number=12,
        name="BiFormer",
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        authors="Zhu et al.",
        arxiv="2303.08810",
        family="sparse",
        computes=(
            "attention of each region of a map to the topk regions with the largest "
            "products of mean query and mean key, and a depthwise convolution of v"
        ),
        call=(
            "tokenmill.nn.BiFormerAttention(regions=7, topk=4, side_dwconv=5)",
            "tokenmill.nn.AttentionLePE",
            "tokenmill.nn.biformer_tiny",
            "tokenmill.nn.biformer_small",
            "tokenmill.nn.biformer_base",
            "tokenmill.bilevel_routing_attention(regions=7, topk=4)",
        ),
        test=("tests/papers/test_12_biformer.py",),
        example="examples/biformer_model.py",
        backends=BACKENDS,
        measured=(
            "map of 150 x 125: 4.8 times as fast as a gather and eager attention, 2.1 "
            "times as a gather and sdpa"
        ),
    ),
    Paper(
        number=33,
        name="HiP",
        title="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
        authors="Lee et al.",
        arxiv="2406.09827",
        family="sparse",
        computes=(
            "attention to the blocks of keys that a tree search finds for each block of queries"
        ),
        call=(
            "tokenmill.hip_attention(budget=512, block_q=64, block_k=2)",
            "tokenmill.policies.HiP(dense_layers=3, refresh_interval=8)",
            "tokenmill.hip_block_select",
            "tokenmill.block_sparse_attention",
        ),
        test=("tests/papers/test_33_hip.py",),
        example="examples/hip_text.py",
        backends=BACKENDS,
        claim="time O(S log S) and memory O(S) in the length",
        measured=(
            "32k tokens, budget 512: 9.3 times (float32) and 17.5 times (bfloat16) as "
            "fast as causal sdpa"
        ),
        note="approximate: what it finds in text is in docs/sparse.md",
    ),
)
