"""Papers on pooling and token mixing."""

from __future__ import annotations

from .paper import BACKENDS, Paper

ROWS = (
    Paper(
        number=16,
        name="TAP, ADL",
        title="Robustifying Token Attention for Vision Transformers",
        authors="Guo et al.",
        arxiv="2303.11126",
        family="pooling",
        computes=(
            "a mean of dilated 3 x 3 means, weighted per token; the cosine between rows"
            " of attention and their mean, as a loss"
        ),
        call=(
            "tokenmill.nn.TokenAwarePooling(num_scales=4)",
            "tokenmill.nn.AttentionDiversificationLoss(threshold=2.0)",
        ),
        test=("tests/papers/test_16_token_aware_pooling.py",),
        backends=BACKENDS,
        claim="+2.4 % on ImageNet-C",
    ),
    Paper(
        number=35,
        name="Learn Your Tokens",
        title="Learn Your Tokens: Word-Pooled Tokenization for Language Modeling",
        authors="Thawani et al.",
        arxiv="2310.11628",
        family="pooling",
        computes=(
            "a small encoder within each word, whose first p rows stand for the word "
            "and are put back in front of the next one"
        ),
        call=(
            "tokenmill.nn.WordPooling(dim=768, num_heads=4, num_layers=2, prefix=4)",
            "tokenmill.nn.SegmentPooling(prefix=4)",
        ),
        test=("tests/papers/test_35_word_pooling.py",),
        backends=BACKENDS,
        claim="accuracy of next words up by more than 300 %",
    ),
    Paper(
        number=41,
        name="PoNet",
        title="PoNet: Pooling Network for Efficient Token Mixing in Long Sequences",
        authors="Tan et al.",
        arxiv="2110.02442",
        family="pooling",
        computes=(
            "(g + the maximum of the segment) * o + the maximum of 3 neighbours, g the "
            "attention of the mean query"
        ),
        call=(
            "tokenmill.nn.PoNetMixing(num_heads=12)",
            "tokenmill.nn.segments_of",
        ),
        test=("tests/tokens/test_nn_stages.py",),
        backends=BACKENDS,
        claim="95.7 % of BERT on GLUE, nearly as fast as FNet",
    ),
    Paper(
        number=49,
        name="Pooling and attention",
        title="Pooling And Attention: What Are Effective Designs For LLm-Based Embedding Models?",
        authors="Tang and Yang",
        arxiv="2409.02727",
        family="pooling",
        computes=(
            "the last token, the mean, or trainable cross-attention over tokens and over layers"
        ),
        call=(
            "tokenmill.nn.EmbeddingPooling(method='attention', num_latents=768, num_heads=32)",
            "tokenmill.segment_reduce(reduce='last')",
        ),
        test=("tests/papers/test_49_embedding_pooling.py",),
        backends=BACKENDS,
    ),
    Paper(
        number=59,
        name="PoolFormer",
        title="MetaFormer Is Actually What You Need for Vision",
        authors="Yu et al.",
        arxiv="2111.11418",
        family="pooling",
        computes="the mean of 3 x 3 pixels, minus the pixel",
        call=(
            "tokenmill.nn.PoolFormerMixing(pool_size=3)",
            "tokenmill.local_pool(subtract_input=True)",
        ),
        test=("tests/tokens/test_nn_pooling.py",),
        backends=BACKENDS,
        claim="82.1 % top-1 (M36, 8.8 GMAC)",
        measured="64 x 56 x 56 x 64: 4.6 to 5.0 times as fast as avg_pool2d",
    ),
)
