"""Papers on linear attention and memories."""

from __future__ import annotations

from functools import partial

from .paper import BACKENDS, IMPORTS, Paper

Row = partial(Paper, family="linear", backends=BACKENDS)
ROWS = (
    Row(
        number=11,
        name="Agent Attention",
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        authors="Han et al.",
        arxiv="2312.08874",
        computes=(
            "softmax(q A^T + B2) softmax(A k^T + B1) v, A = pooled queries, and a "
            "depthwise convolution of v; in Stable Diffusion without training, A = "
            "tokens merged further, and 0.075 v"
        ),
        call=(
            "tokenmill.nn.AgentAttention(agents=7)",
            "tokenmill.integrations.diffusers.patch(ratio=0.4, cell=(4, 4), agent_ratio=0.95)",
        ),
        test=(
            "tests/papers/test_11_agent_attention.py",
            "tests/test_diffusion_models.py",
            "tests/dense/test_attention.py",
        ),
        checked="released code: LeapLabTHU/Agent-Attention at 207ce3e",
        missing=(
            "keys of fewer pixels in PVT (sr_ratio above 1) and stripes of CSWin: the "
            "code allows them, no released model has them"
        ),
        claim=(
            "Stable Diffusion v1.5 1.84 times as fast with half of the memory at a better "
            "FID, without training; DeiT, PVT, Swin and CSWin more accurate at the same "
            "operations"
        ),
        note=(
            "layers of the released DeiT, PVT, Swin and CSWin load; agents 9, 16, 49, 49 in"
            " the stages, 49 or 81 in DeiT; tests/test_diffusion_models.py has the oracle "
            "of agentsd, which there works on the models of diffusers"
        ),
        keywords=(
            "linear attention",
            "softmax attention",
            "agent tokens",
            "vision transformer",
            "DeiT",
            "Swin",
            "PVT",
            "CSWin",
            "Stable Diffusion",
            "diffusion",
            "image generation",
            "AgentSD",
            "token merging",
            "ImageNet",
        ),
        snippet=IMPORTS
        + """\
layer = tm.nn.AgentAttention(16, num_heads=2, grid=4, agents=2, class_token=True)
print(layer(torch.randn(1, 17, 16)).shape)
""",
    ),
    Row(
        number=45,
        name="Titans",
        title="Titans: Learning to Memorize at Test Time",
        authors="Behrouz et al.",
        arxiv="2501.00663",
        computes=(
            "a memory M_t = (1 - alpha_t) M + S_t, S_t = eta_t S - theta_t grad |k M - "
            "v|^2: with a linear M a gated delta rule with momentum; and the three ways"
            " of joining it with attention and persistent tokens: as context, as gate, "
            "as layer"
        ),
        call=(
            "tokenmill.titans_memory(chunk_size=64)",
            "tokenmill.titans_memory_decode",
            "tokenmill.nn.TitansMemory(depth=1)",
            "tokenmill.nn.TitansMAC(segment=128, persistent=4)",
            "tokenmill.nn.TitansMAG(window=128, persistent=4)",
            "tokenmill.nn.TitansMAL(window=128, persistent=4)",
        ),
        test=(
            "tests/papers/test_45_titans_layers.py",
            "tests/papers/test_45_titans.py",
            "tests/linear/test_titans_memory.py",
        ),
        example="examples/papers/titans.py",
        checked="text only",
        differs=(
            "the authors released no code. titans-pytorch (lucidrains, cc016eb), the "
            "implementation in wide use, has learned tokens in place of what the memory "
            "holds, adds what the memory reads to the stream, keeps persistent tokens as"
            " keys and values of each head, and has no memory as layer; we follow the "
            "text. Two readings keep a token from seeing later ones: it sees what was "
            "retrieved for tokens up to itself (retrieved='segment' is the drawing of "
            "the paper), and reads the memory after its own step"
        ),
        claim="contexts of more than 2 M tokens",
        note=(
            "decoding of the memory by slots, and a memory of several matrices, which is "
            "slow, are plain PyTorch; the tests of the memory are in "
            "tests/papers/test_45_titans.py"
        ),
        keywords=(
            "test-time training",
            "neural memory",
            "memory as context",
            "MAC",
            "MAG",
            "MAL",
            "persistent memory",
            "surprise",
            "momentum",
            "forgetting",
            "delta rule",
            "long context",
            "recurrent",
            "linear attention",
        ),
        snippet=IMPORTS
        + """\
layer = tm.nn.TitansMAC(16, 2, segment=4)
y, state = layer(torch.randn(1, 8, 16), return_state=True)
print(layer(torch.randn(1, 4, 16), state).shape)
""",
    ),
    Row(
        number=57,
        name="Lightning Attention",
        title=(
            "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention"
        ),
        authors="Qin et al.",
        arxiv="2405.17381",
        computes=(
            "sum over s <= t of lambda^(t - s) (q_t.k_s) v_s, by blocks with a state "
            "between them; the layer of TransNormerLLM around it, with learned "
            "positions, a gate and norms without weights"
        ),
        call=(
            "tokenmill.lightning_attention",
            "tokenmill.lightning_slopes(layer=0, num_layers=24)",
            (
                "tokenmill.nn.TransNormerLayer(dim=1024, num_heads=8, layer=0, num_layers=24, "
                "glu_dim=2816)"
            ),
            "tokenmill.nn.MiniMaxLightningAttention",
            "tokenmill.linear_attention_decode",
        ),
        test=(
            "tests/papers/test_57_transnormer.py",
            "tests/papers/test_57_lightning_attention.py",
            "tests/papers/test_57_lightning.py",
            "tests/linear/test_linear_attention_decode.py",
        ),
        example="examples/long_context_lm.py",
        checked="released code: Doraemonzzz/nanoTransNormer at d9e635a",
        differs=(
            "slopes: the formula of the text is linear in the head, the released code "
            "has those of ALiBi times 1 - l/(L-1) + 1e-5, which we follow "
            "(convention='paper' is the text). Positions: the text has them in the first"
            " layer only, which we follow; that code has them in all others"
        ),
        claim="the same tokens/s at any length",
        measured=(
            "8192 tokens, D = 64: 56 times as fast as causal sdpa (float32), 6.7 times "
            "as the best eager chunked form"
        ),
        counted=(
            "tests/papers/test_57_transnormer.py: the state after any number of tokens "
            "has 4 C F bytes; the work of a token does not depend on how many came "
            "before it"
        ),
        note=(
            "MiniMax-01's layer (silu of values too, sigmoid gate, RMSNorm with weights) is"
            " nn.MiniMaxLightningAttention, tested against transformers in "
            "tests/papers/test_57_lightning_attention.py; blocks and their state in "
            "test_57_lightning.py"
        ),
        keywords=(
            "linear attention",
            "lightning attention",
            "TransNormerLLM",
            "TNL",
            "MiniMax",
            "decay",
            "retention",
            "constant speed",
            "linear complexity",
            "LRPE",
            "SimpleRMSNorm",
            "SGLU",
            "gated linear unit",
            "recurrent state",
        ),
        snippet=IMPORTS
        + """\
layer = tm.nn.TransNormerLayer(16, 2, layer=0, num_layers=4)
y, state = layer(torch.randn(1, 9, 16), return_state=True)
print(layer(torch.randn(1, 1, 16), state).shape)
""",
    ),
    Row(
        number=58,
        name="Based",
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        authors="Arora et al.",
        arxiv="2402.18668",
        computes=(
            "causal linear attention with the features 1, x, x x^T / sqrt(2) of "
            "dimension 16, in turn with layers of softmax in a window of 128 tokens"
        ),
        call=(
            "tokenmill.nn.TaylorWindowBlock(num_heads=16, feature_dim=16, window=128)",
            "tokenmill.linear_attention(feature_map='taylor2', normalize=True)",
            "tokenmill.attention(causal=True, window=(128, 0))",
        ),
        test=(
            "tests/papers/test_58_taylor_window.py",
            "tests/papers/test_58_based.py",
            "tests/linear/test_linear_attention.py",
        ),
        checked="released code: HazyResearch/based at 32c1bd4",
        differs=(
            "window_size=256 of the released models is a reach of 128 tokens to the "
            "left, and the token itself: 129 keys, which we follow. The denominator has "
            "1e-12 more there (1e-6 in the Triton form), less than a rounding of float32"
        ),
        missing=(
            "the released models have gated convolutions of 3 tokens in the other "
            "layers, which are plain PyTorch: a reader has torch.nn.Conv1d for them"
        ),
        claim=(
            "generation 24 times as fast as with FlashAttention-2 (1.3 B parameters, 1024 tokens)"
        ),
        counted=(
            "tests/papers/test_58_taylor_window.py: a state has 153 x (D + 1) numbers a "
            "head and 128 keys and values, whatever the length"
        ),
        keywords=(
            "linear attention",
            "Taylor",
            "feature map",
            "sliding window",
            "recall",
            "throughput",
            "hybrid",
            "recurrent state",
            "based",
            "softmax approximation",
        ),
        snippet=IMPORTS
        + """\
block = tm.nn.TaylorWindowBlock(16, 2, window=4)
y, state = block(torch.randn(1, 9, 16), return_state=True)
print(block(torch.randn(1, 1, 16), state).shape)
""",
    ),
)
