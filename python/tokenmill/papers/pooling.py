"""Papers on pooling and token mixing."""

from __future__ import annotations

from functools import partial

from .paper import BACKENDS, IMPORTS, Paper

Row = partial(Paper, family="pooling", backends=BACKENDS)
ROWS = (
    Row(
        number=16,
        name="TAP, ADL",
        title="Robustifying Token Attention for Vision Transformers",
        authors="Guo et al.",
        arxiv="2303.11126",
        computes=(
            "a mean of dilated 3 x 3 means, weighted per token; the cosine between rows"
            " of attention and their mean, as a loss"
        ),
        call=(
            "tokenmill.nn.TokenAwarePooling(num_scales=4)",
            "tokenmill.nn.AttentionDiversificationLoss(threshold=2.0)",
        ),
        test=(
            "tests/papers/test_16_token_aware_pooling.py",
            "tests/tokens/test_local_pool.py",
        ),
        checked="released code: guoyongcs/TAPADL at 6e4dbff",
        claim="+2.4 % on ImageNet-C",
        keywords=(
            "token-aware average pooling",
            "attention diversification",
            "robustness",
            "corruption",
            "dilated pooling",
            "local neighbourhood",
            "vision transformer",
            "ImageNet-C",
            "ImageNet",
            "loss",
        ),
        snippet=IMPORTS
        + """\
pooling = tm.nn.TokenAwarePooling(64, num_scales=4)
print(pooling(torch.randn(1, 14, 14, 64)).shape)  # torch.Size([1, 14, 14, 64])
loss = tm.nn.AttentionDiversificationLoss(threshold=2.0)
print(loss(torch.rand(1, 196, 196).softmax(-1)).shape)  # torch.Size([])
""",
    ),
    Row(
        number=35,
        name="Learn Your Tokens",
        title="Learn Your Tokens: Word-Pooled Tokenization for Language Modeling",
        authors="Thawani et al.",
        arxiv="2310.11628",
        computes=(
            "a small encoder within each word, whose first p rows stand for the word "
            "and are put back in front of the next one"
        ),
        call=(
            "tokenmill.nn.WordPooling(dim=768, num_heads=4, num_layers=2, prefix=4)",
            "tokenmill.nn.SegmentPooling(prefix=4)",
        ),
        test=(
            "tests/papers/test_35_word_pooling.py",
            "tests/tokens/test_nn_pooling.py",
            "tests/tokens/test_segment_reduce.py",
        ),
        checked="text only",
        claim="accuracy of next words up by more than 300 %",
        keywords=(
            "word pooling",
            "tokenization",
            "byte-level",
            "character-level",
            "language modeling",
            "segment pooling",
            "prefix",
            "variable-length words",
            "packed sequences",
        ),
        snippet=IMPORTS
        + """\
pool = tm.nn.WordPooling(dim=32, num_heads=4, num_layers=2, prefix=4)
x, offsets = torch.randn(11, 32), torch.tensor([0, 4, 9, 11], dtype=torch.int32)
print(pool(x, offsets).shape)  # torch.Size([3, 4, 32])
""",
    ),
    Row(
        number=41,
        name="PoNet",
        title="PoNet: Pooling Network for Efficient Token Mixing in Long Sequences",
        authors="Tan et al.",
        arxiv="2110.02442",
        computes=(
            "(g + the maximum of the segment) * o + the maximum of 3 neighbours, g the "
            "attention of the mean query"
        ),
        call=(
            "tokenmill.nn.PoNetMixing(num_heads=12)",
            "tokenmill.nn.segments_of",
        ),
        test=(
            "tests/papers/test_41_ponet.py",
            "tests/tokens/test_local_pool.py",
        ),
        checked="released code: lxchtan/PoNet at cc9a29a",
        claim="95.7 % of BERT on GLUE, nearly as fast as FNet",
        counted=(
            "operations of a token are the same at 512 and 4096 tokens; at 4096 tokens "
            "of 768 channels they are a third of those of self-attention with its "
            "projections (test_operations_of_a_token)"
        ),
        keywords=(
            "pooling network",
            "token mixing",
            "segment max-pooling",
            "global aggregation",
            "local max-pooling",
            "linear complexity",
            "long sequences",
            "BERT",
            "GLUE",
            "Long Range Arena",
            "FNet",
        ),
        snippet=IMPORTS
        + """\
layer = tm.nn.PoNetMixing(64, num_heads=4)
segments = tm.nn.segments_of(torch.rand(2, 30) < 0.2)
print(layer(torch.randn(2, 30, 64), segments).shape)  # torch.Size([2, 30, 64])
""",
    ),
    Row(
        number=49,
        name="Pooling and attention",
        title="Pooling And Attention: What Are Effective Designs For LLm-Based Embedding Models?",
        authors="Tang and Yang",
        arxiv="2409.02727",
        computes=(
            "the last token, the mean, or trainable cross-attention over tokens and over layers"
        ),
        call=(
            "tokenmill.nn.EmbeddingPooling(method='attention', num_latents=768, num_heads=32)",
            "tokenmill.segment_reduce(reduce='last')",
        ),
        test=(
            "tests/papers/test_49_embedding_pooling.py",
            "tests/tokens/test_segment_reduce.py",
        ),
        checked="released code: yixuantt/PoolingAndAttn at 57791d5",
        keywords=(
            "text embedding",
            "sentence embedding",
            "last-token pooling",
            "mean pooling",
            "EOS",
            "trainable pooling",
            "cross-attention",
            "multi-layers pooling",
            "retrieval",
            "LLM",
            "MTEB",
        ),
        snippet=IMPORTS
        + """\
pool = tm.nn.EmbeddingPooling(64, "mean", layers=2, num_latents=16, num_heads=4, head_dim=16)
states, mask = [torch.randn(2, 9, 64)] * 2, torch.ones(2, 9, dtype=torch.bool)
print(pool(states, mask).shape)  # torch.Size([2, 64])
""",
    ),
    Row(
        number=59,
        name="PoolFormer",
        title="MetaFormer Is Actually What You Need for Vision",
        authors="Yu et al.",
        arxiv="2111.11418",
        computes=(
            "the mean of 3 x 3 pixels, minus the pixel, in place of attention; the "
            "whole models S12 to M48"
        ),
        call=(
            "tokenmill.nn.PoolFormerMixing(pool_size=3)",
            "tokenmill.local_pool(subtract_input=True)",
            "tokenmill.nn.poolformer_s12",
            "tokenmill.nn.poolformer_s24",
            "tokenmill.nn.poolformer_s36",
            "tokenmill.nn.poolformer_m36",
            "tokenmill.nn.poolformer_m48",
        ),
        test=(
            "tests/papers/test_59_poolformer.py",
            "tests/tokens/test_nn_pooling.py",
            "tests/tokens/test_local_pool.py",
        ),
        checked="released code: sail-sg/poolformer at a075575; peer: timm's poolformer_s12",
        claim="82.1 % top-1 on ImageNet (M36, 8.8 G multiplications)",
        measured="64 x 56 x 56 x 64: 4.6 to 5.0 times as fast as avg_pool2d",
        counted=(
            "tests/papers/test_59_poolformer.py counts parameters and multiplications of"
            " all five models: 12, 21, 31, 56 and 73 M; 1.8, 3.4, 5.0, 8.8 and 11.6 G at"
            " 224 x 224, as the release states them"
        ),
        note=(
            "timm norms the mean of the pixels where the release norms the map: its stages "
            "are compared, not its head; norms after the four maps (norm0, norm2, norm4, "
            "norm6 of dense prediction) are the caller's"
        ),
        keywords=(
            "MetaFormer",
            "token mixer",
            "average pooling",
            "pooling",
            "vision transformer",
            "without attention",
            "ImageNet",
            "image classification",
            "attention-free",
        ),
        snippet=IMPORTS
        + """\
model = tm.nn.PoolFormer((1, 1, 1, 1), (8, 8, 16, 16), num_classes=10).eval()
print(model(torch.randn(1, 3, 32, 32)).shape)
""",
    ),
)
