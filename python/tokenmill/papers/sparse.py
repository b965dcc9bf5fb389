"""Papers on sparse and long-context attention."""

from __future__ import annotations

from functools import partial

from .paper import BACKENDS, IMPORTS, Paper

Row = partial(Paper, family="sparse", backends=BACKENDS)
ROWS = (
    Row(
        number=6,
        name="Landmark Attention",
        title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
        authors="Mohtashami and Jaggi",
        arxiv="2305.16300",
        computes=(
            "a grouped softmax: the tokens of an earlier block share the weight of its "
            "landmark; at inference the topk blocks whose landmarks score highest, "
            "rotated to slots right before the local tokens, for single tokens and "
            "chunks of a prompt"
        ),
        call=(
            "tokenmill.landmark_attention(block=64)",
            "tokenmill.landmark_decode(block=64, topk=5, rope=(cos, sin))",
        ),
        test=(
            "tests/sparse/test_landmark_decode_released.py",
            "tests/sparse/test_landmark_attention.py",
            "tests/sparse/test_landmark_decode.py",
        ),
        checked="released code: epfml/landmark-attention at d963e50",
        differs=(
            "the release numbers positions through the whole text and puts the topk + 1 "
            "slots before the local tokens; we count from the first slot, which has the "
            "same distances and needs (topk + 2) block + Sq rows of rope. Its grouped "
            "softmax has 63 blocks at most; ours any number"
        ),
        missing=(
            "its memory hierarchy (blocks in CPU memory, copied to the GPU when they are"
            " retrieved): the cache lies on one device, because a copy that depends on "
            "what was selected waits for the device in every layer; a cache on the CPU "
            "can be read there by the CPU kernels"
        ),
        claim="LLaMA-7B with a context of 32k, and fewer tokens retrieved",
        counted=(
            "no more of the cache is copied than landmarks and retrieved blocks "
            "(tests/sparse/test_landmark_decode.py::test_no_more_of_the_cache_is_copied_than_blocks_and_landmarks);"
            " a text of any length is read with positions up to (topk + 2) block + Sq "
            "(test_a_model_reads_a_prompt_in_chunks_and_goes_on)"
        ),
        note=(
            "pays in decoding; landmark_attention is exact, and 3 to 19 % slower than "
            "causal; share='queries' and share='heads' are the release's max_over_tokens "
            "and max_over_heads"
        ),
        keywords=(
            "landmark token",
            "random access",
            "infinite context",
            "grouped softmax",
            "retrieval",
            "block retrieval",
            "long context",
            "32k",
            "length extrapolation",
            "memory",
            "KV cache",
            "rotary",
            "RoPE",
            "chunked prefill",
            "top-k blocks",
            "sparse attention",
            "LLaMA",
        ),
        snippet=IMPORTS
        + """\
k, v = torch.randn(2, 1, 256, 2, 16)
angles = torch.arange(79.0)[:, None] / 10000 ** (torch.arange(8) / 8)
out = tm.landmark_decode(
    torch.randn(1, 16, 4, 16),
    k,
    v,
    seqlens_k=torch.tensor([256], dtype=torch.int32),
    block=16,
    topk=2,
    rope=(angles.cos(), angles.sin()),
)
print(out.shape)
""",
    ),
    Row(
        number=9,
        name="CCA",
        title="Core Context Aware Attention for Long Context Language Modeling",
        authors="Chen et al.",
        arxiv="2412.12465",
        computes=(
            "causal attention to a window of tokens and to one core for each group "
            "before it: the keys and values of the group, weighted as its last query "
            "weighs them; query i sees floor((i + 1 - window) / group) cores"
        ),
        call=(
            "tokenmill.core_context_attention(cores='query', window=1024, group=16)",
            "tokenmill.sparse.CoreContextState(cores='query', window=1024, group=16)",
        ),
        test=("tests/sparse/test_core_context_attention.py",),
        checked="released code: chenyaofo/CCA-Attention at 052cc8e",
        differs=(
            "the paper's formulas pool the inputs of a group and project the sum, and "
            "begin the window with the last token of the newest core; the release pools "
            "rotated keys and values of each query head, and begins the window after "
            "that token: we follow the release. Its Triton kernel (300 queries or more) "
            "shows the first core group - 1 queries early, because it divides towards "
            "zero, and its Qwen2 path rounds the cores of a training step down to a "
            "multiple of 64: there we follow its mask"
        ),
        claim="7.9 times as fast and 93 % less KV cache at 128K tokens",
        counted=(
            "test_what_a_cache_of_128k_tokens_keeps: with cores='kv' and the defaults "
            "9216 of 131072 keys and values stay, 93 % less"
        ),
        note=(
            "cores='kv' is our variant: one core for each KV head, weighed by the mean "
            "query of its heads"
        ),
        keywords=(
            "CCA",
            "CCA-Attention",
            "core token",
            "core context",
            "globality-aware pooling",
            "locality-preserving",
            "long context",
            "sparse attention",
            "pooling",
            "sliding window",
            "KV cache",
            "compression",
            "plug-and-play",
            "GQA",
            "fine-tuning",
            "LLM",
        ),
        snippet=IMPORTS
        + """\
q, k, v = torch.randn(1, 100, 4, 16), torch.randn(1, 100, 2, 16), torch.randn(1, 100, 2, 16)
out = tm.core_context_attention(q, k, v, window=32, group=8)
state = tm.sparse.CoreContextState(window=32, group=8)
state.prefill(q[:, :99], k[:, :99], v[:, :99])
print((state.step(q[:, 99:], k[:, 99:], v[:, 99:]) - out[:, 99:]).abs().max() < 1e-5)
""",
    ),
    Row(
        number=10,
        name="Sparsifiner",
        title=(
            "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient "
            "Vision Transformers"
        ),
        authors="Wei et al.",
        arxiv="2303.13755",
        computes=(
            "attention of each token to the tokens with the largest low-rank estimate "
            "of it; tokens to which the class token attends least leave in some blocks"
        ),
        call=(
            "tokenmill.nn.SparsifinerAttention(keep_rate=0.25, reduce_tokens=6, coefficients=8)",
            "tokenmill.nn.SparsifinerEncoder(layers=(3, 6, 9), token_keep_rate=0.7)",
        ),
        test=("tests/sparse/test_sparsifiner.py",),
        checked="released code: lim142857/Sparsifiner at 9a11e26",
        differs=(
            "the release scales the estimate by 1 / sqrt(heads), and its class token "
            "gives tokens that have left the weight of a logit 0 and a value 0; we "
            "follow the release. Its functions default to N // 8 patterns, its "
            "experiment has N // 6 = 32, which is our default; both keep 8 coefficients"
        ),
        claim=(
            "48 to 69 % fewer operations of attention at a loss of 0.4 % or less, above 60"
            " % of a vision transformer if tokens leave too"
        ),
        counted=(
            "tests/sparse/test_sparsifiner.py counts the attention of DeiT-S: 48, 63 and"
            " 69 % fewer operations where 25, 10 and 4 % of the tokens are attended to, "
            "products with a 0 left out as in the paper; 25, 40 and 46 % fewer as the "
            "layer runs it; all blocks, in the proportions of DeiT-S, take 61 % fewer "
            "operations at token_keep_rate=0.3 (2 % without tokens that leave)"
        ),
        note=(
            "fewer operations, not less time: dense attention is faster on a CPU unless "
            "lists are short (docs/sparse.md)"
        ),
        keywords=(
            "sparse attention",
            "token pruning",
            "connectivity",
            "low-rank",
            "mask predictor",
            "vision transformer",
            "ViT",
            "DeiT",
            "instance-dependent",
            "prune",
            "drop tokens",
            "ImageNet",
            "FLOPs",
        ),
        snippet=IMPORTS
        + """\
encoder = tm.nn.SparsifinerEncoder(32, 2, 4, num_tokens=26, layers=(1,), token_keep_rate=0.5)
y, source = encoder(torch.randn(1, 26, 32))
print(y.shape, source.shape)
""",
    ),
    Row(
        number=12,
        name="BiFormer",
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        authors="Zhu et al.",
        arxiv="2303.08810",
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
        test=(
            "tests/papers/test_12_biformer.py",
            "tests/sparse/test_biformer.py",
            "tests/sparse/test_bilevel_routing_attention.py",
        ),
        example="examples/biformer_model.py",
        checked="released code: rayleizhu/BiFormer at 1697bbb",
        differs=(
            "where the map is no multiple of the regions, the refactored release pads "
            "after the projection and leaves the padding out of means, the older one "
            "does not: we follow the refactored one"
        ),
        measured=(
            "map of 150 x 125: 4.8 times as fast as a gather and eager attention, 2.1 "
            "times as a gather and sdpa"
        ),
        keywords=(
            "bi-level routing attention",
            "BRA",
            "region routing",
            "dynamic sparse attention",
            "sparse attention",
            "content-aware",
            "vision transformer",
            "ViT",
            "ImageNet",
            "detection",
            "segmentation",
            "windows",
            "local context enhancement",
            "LePE",
        ),
        snippet=IMPORTS
        + """\
layer = tm.nn.BiFormerAttention(64, num_heads=2, regions=7, topk=4)
print(layer(torch.randn(1, 28, 28, 64)).shape)  # torch.Size([1, 28, 28, 64])
q = k = v = torch.randn(1, 28, 28, 2, 32)
out = tm.bilevel_routing_attention(q, k, v, regions=7, topk=4)
""",
    ),
    Row(
        number=33,
        name="HiP",
        title="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
        authors="Lee et al.",
        arxiv="2406.09827",
        computes=(
            "attention to the blocks of keys that a tree search finds for each block of queries"
        ),
        call=(
            "tokenmill.hip_attention(budget=512, block_q=64, block_k=2)",
            "tokenmill.policies.HiP(dense_layers=3, refresh_interval=8)",
            "tokenmill.hip_block_select",
            "tokenmill.block_sparse_attention",
        ),
        test=(
            "tests/papers/test_33_hip.py",
            "tests/sparse/test_block_sparse_attention.py",
        ),
        example="examples/hip_text.py",
        checked="text only",
        claim="time O(S log S) and memory O(S) in the length",
        measured=(
            "32k tokens, budget 512: 9.3 times (float32) and 17.5 times (bfloat16) as "
            "fast as causal sdpa"
        ),
        note=(
            "approximate: what it finds in text is in docs/sparse.md. The release may not "
            "be used commercially, so only the text was read"
        ),
        keywords=(
            "HiP attention",
            "sparse attention",
            "sub-quadratic",
            "hierarchical pruning",
            "tree search",
            "top-k blocks",
            "block-sparse attention",
            "long context",
            "training-free",
            "LLM",
            "prefill",
            "decoding",
            "linear memory",
        ),
        snippet=IMPORTS
        + """\
q, k, v = torch.randn(1, 1024, 4, 32), *torch.randn(2, 1, 1024, 2, 32)
out = tm.hip_attention(q, k, v, budget=256, block_q=64, block_k=2)
print(out.shape)  # torch.Size([1, 1024, 4, 32])
""",
    ),
)
