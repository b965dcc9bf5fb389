"""Papers on attention with other weights and scores."""

from __future__ import annotations

from functools import partial

from .paper import BACKENDS, IMPORTS, PLAIN, Paper

Row = partial(Paper, family="dense", backends=BACKENDS)
ROWS = (
    Row(
        number=2,
        name="iLLaMA",
        title="Adapting LLaMA Decoder to Vision Transformer",
        authors="Wang et al.",
        arxiv="2404.06773",
        computes="(softmax(z) * (alpha + (1 - alpha) tril)) v, alpha from 1 to 0, not renormalised",
        call=("tokenmill.soft_causal_attention",),
        test=("tests/papers/test_02_illama.py",),
        example="examples/papers/digits.py",
        checked="released code: techmonsterwang/iLLaMA at dfc93b9",
        claim="75.1 % top-1 with 5.7 M parameters, 86.0 % with 310 M",
        keywords=(
            "soft mask",
            "causal mask",
            "causal attention for images",
            "class token at the end",
            "post-sequence class token",
            "vision transformer",
            "LLaMA",
            "decoder",
            "ImageNet",
            "classification",
        ),
        snippet=IMPORTS
        + """\
q = k = v = torch.randn(1, 197, 4, 32)
out = tm.soft_causal_attention(q, k, v, alpha=0.5)
print(out.shape)  # torch.Size([1, 197, 4, 32])
""",
    ),
    Row(
        number=23,
        name="CACE",
        title=(
            "Focus on the Whole Character: Discriminative Character Modeling for Scene "
            "Text Recognition"
        ),
        authors="Zhou et al.",
        arxiv="2407.05562",
        computes=(
            "softmax weights times gamma_h^dist(i, j) on a grid, gamma_h = 1 - 2^(-5 - "
            "h), not renormalised, after rotary positions; a loss with a memory of each"
            " character: |x - c_y|^2 / (1 + sum over others |x - c_j|^2)"
        ),
        call=(
            "tokenmill.nn.CharacterAttention(grid=(8, 32))",
            "tokenmill.nn.CharacterConsistencyLoss(weight=0.2)",
            "tokenmill.attention(post_decay=...)",
            "tokenmill.masks.decay2d(distance='chebyshev')",
        ),
        test=(
            "tests/papers/test_23_character.py",
            "tests/papers/test_23_cace.py",
        ),
        example="examples/papers/digits.py",
        checked="released code: bang123-box/CFE at 0f2ea6f",
        missing="the convolutions between stages and the text decoder are ordinary PyTorch",
        claim="94.1 and 61.6 % accuracy",
        note=(
            "log gamma * dist as a bias is something else: it renormalises; masks and kinds"
            " are tested in tests/papers/test_23_cace.py"
        ),
        keywords=(
            "scene text recognition",
            "OCR",
            "decay matrix",
            "character",
            "consistency loss",
            "contrastive center loss",
            "long-term memory",
            "locality",
            "grid",
            "rotary",
            "intra-class",
            "inter-class",
        ),
        snippet=IMPORTS
        + """\
y = tm.nn.CharacterAttention(16, 2, grid=(2, 4))(torch.randn(1, 8, 16))
print(tm.nn.CharacterConsistencyLoss(10, 16)(y, torch.arange(8)[None]))
""",
    ),
    Row(
        number=26,
        name="Active-dormant heads",
        title=(
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token "
            "Phenomena in LLMs"
        ),
        authors="Guo et al.",
        arxiv="2410.13835",
        computes="relu(q.k) in place of softmax, divided by the number of keys that a token sees",
        call=(
            "tokenmill.attention(kind='relu', normalize='count', causal=True)",
            "tokenmill.attention(kind='relu')",
        ),
        test=(
            "tests/papers/test_26_relu.py",
            "tests/dense/test_attention_kinds.py",
        ),
        checked="released code: GuoTianYu2000/Active-Dormant-Attention at 16b3593",
        differs=(
            "the released code divides the weights of token i by the i + 1 keys that it "
            "sees, which is normalize='count'; our call was relu(q.k) as it is, which "
            "remains as normalize=None"
        ),
        keywords=(
            "relu attention",
            "attention sink",
            "extreme tokens",
            "dormant heads",
            "massive activations",
            "value state",
            "bigram-backcopy",
            "softmax",
        ),
        snippet=IMPORTS
        + """\
q, k, v = torch.randn(3, 1, 6, 2, 16).unbind()
print(tm.attention(q, k, v, kind="relu", normalize="count", causal=True).shape)
""",
    ),
    Row(
        number=40,
        name="Sigmoid attention",
        title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        authors="Ramapuram et al.",
        arxiv="2409.04431",
        computes="sigmoid(q k^T / sqrt(d) - log n) v",
        call=(
            "tokenmill.sigmoid_attention(score_bias='neg_log_n')",
            "tokenmill.nn.SigmoidAttention(score_bias='neg_log_n')",
        ),
        test=(
            "tests/papers/test_40_sigmoid_attention.py",
            "tests/dense/test_attention.py",
        ),
        example="examples/papers/digits.py",
        checked="released code: apple/ml-sigmoid-attention at 9273b49",
        claim="17 % faster than FlashAttention-2 on an H100, forward",
        measured=(
            "S = 2048, float32: 1.29 times as fast as sdpa (which is softmax), 4.54 times as eager"
        ),
        keywords=(
            "FlashSigmoid",
            "sigmoid",
            "attention without softmax",
            "elementwise attention",
            "normalization",
            "bias",
            "language model",
            "vision transformer",
            "LayerScale",
            "QK norm",
        ),
        snippet=IMPORTS
        + """\
q, k, v = torch.randn(2, 100, 8, 64), *torch.randn(2, 2, 100, 2, 64)
out = tm.sigmoid_attention(q, k, v, causal=True)  # score bias -log n
print(out.shape)  # torch.Size([2, 100, 8, 64])
""",
    ),
    Row(
        number=47,
        name="TokenFormer",
        title="TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters",
        authors="Wang et al.",
        arxiv="2410.23168",
        computes="act(x K^T) V against learned keys and values, act = gelu(z sqrt(n) / |z|)",
        call=(
            "tokenmill.pattention(activation='l2_norm_gelu')",
            "tokenmill.nn.Pattention",
        ),
        test=("tests/papers/test_47_tokenformer.py",),
        example="examples/papers/grow_layers.py",
        backends=PLAIN,
        checked="released code: Haiyang-W/TokenFormer at 4d56c73",
        differs=(
            "the release divides by the norm as it is; a token of zeros is NaN there and zeros here"
        ),
        missing=(
            "a block is nn.Pattention in place of each linear layer and of the network: "
            "examples/papers/grow_layers.py builds one"
        ),
        claim="grows from 124 M to 1.4 B parameters",
        counted=(
            "tests/papers/test_47_tokenformer.py: a layer that gains tokens computes the"
            " same before it is trained"
        ),
        note="plain PyTorch, in parts, so that the matrix of weights is never whole in memory",
        keywords=(
            "parameter tokens",
            "pattention",
            "scaling",
            "grow",
            "progressive",
            "mixture",
            "key-value parameters",
            "feed-forward",
            "linear layer",
            "incremental",
        ),
        snippet=IMPORTS
        + """\
layer = tm.nn.Pattention(16, 8, num_tokens=6)
layer.append(10)
print(layer(torch.randn(3, 16)).shape)
""",
    ),
    Row(
        number=51,
        name="Pointer Networks",
        title="Pointer Networks",
        authors="Vinyals et al.",
        arxiv="1506.03134",
        computes="softmax over inputs of v . tanh(W1 e_j + W2 d_i), and the largest of them",
        call=(
            "tokenmill.additive_attention",
            "tokenmill.pointer_argmax",
        ),
        test=(
            "tests/papers/test_51_pointer_networks.py",
            "tests/dense/test_additive_attention.py",
        ),
        example="examples/papers/sort_numbers.py",
        checked="text only",
        missing="the LSTM around it is torch.nn.LSTM",
        measured=(
            "1024 queries and inputs, A = 128: 21.3 times as fast as eager code, which "
            "has all tangents in memory"
        ),
        counted=(
            "tests/papers/test_51_pointer_networks.py: the largest tensor of a call has "
            "2^18 elements or less, where all tangents have N T A"
        ),
        note="the tangents of all pairs are never in memory",
        keywords=(
            "additive attention",
            "Bahdanau",
            "pointer",
            "copy mechanism",
            "tanh",
            "sorting",
            "convex hull",
            "travelling salesman",
            "sequence to sequence",
            "argmax",
        ),
        snippet=IMPORTS
        + """\
q, k, v = torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(8)
print(tm.pointer_argmax(q, k, v))
""",
    ),
)
