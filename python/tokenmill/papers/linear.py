"""Papers on linear attention and memories."""

from __future__ import annotations

from .paper import BACKENDS, Paper

ROWS = (
    Paper(
        number=11,
        name="Agent Attention",
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        authors="Han et al.",
        arxiv="2312.08874",
        family="linear",
        computes=(
            "softmax(q A^T + B2) softmax(A k^T + B1) v, A = 49 pooled queries, and a "
            "depthwise convolution of v"
        ),
        call=("tokenmill.nn.AgentAttention(agents=7)",),
        test=("tests/papers/test_11_agent_attention.py",),
        backends=BACKENDS,
    ),
    Paper(
        number=45,
        name="Titans",
        title="Titans: Learning to Memorize at Test Time",
        authors="Behrouz et al.",
        arxiv="2501.00663",
        family="linear",
        computes=(
            "a memory M_t = (1 - alpha_t) M + S_t, S_t = eta_t S - theta_t grad |k M - "
            "v|^2: with a linear M a gated delta rule with momentum"
        ),
        call=(
            "tokenmill.titans_memory(chunk_size=64)",
            "tokenmill.titans_memory_decode",
            "tokenmill.nn.TitansMemory(depth=1)",
        ),
        test=("tests/papers/test_45_titans.py",),
        example="examples/papers/titans.py",
        backends=BACKENDS,
        claim="contexts of more than 2 M tokens",
        note="decoding, and a memory of several layers, which is slow, are plain PyTorch",
    ),
    Paper(
        number=57,
        name="Lightning Attention",
        title=(
            "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention"
        ),
        authors="Qin et al.",
        arxiv="2405.17381",
        family="linear",
        computes=(
            "sum over s <= t of lambda^(t - s) (q_t.k_s) v_s, by blocks with a state between them"
        ),
        call=(
            "tokenmill.lightning_attention",
            "tokenmill.lightning_slopes(convention='paper')",
            "tokenmill.nn.LightningAttention(convention='paper')",
            "tokenmill.linear_attention_decode",
        ),
        test=("tests/papers/test_57_lightning.py",),
        example="examples/long_context_lm.py",
        backends=BACKENDS,
        claim="the same tokens/s at any length",
        measured=(
            "8192 tokens, D = 64: 56 times as fast as causal sdpa (float32), 6.7 times "
            "as the best eager chunked form"
        ),
    ),
    Paper(
        number=58,
        name="Based",
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        authors="Arora et al.",
        arxiv="2402.18668",
        family="linear",
        computes=(
            "causal linear attention with the features 1, x, x x^T / sqrt(2) of "
            "dimension 16, beside layers of softmax in a window"
        ),
        call=(
            "tokenmill.linear_attention(feature_map='taylor2', normalize=True)",
            "tokenmill.attention(causal=True, window=(127, 0))",
        ),
        test=("tests/papers/test_58_based.py",),
        backends=BACKENDS,
        claim=(
            "generation 24 times as fast as with FlashAttention-2 (1.3 B parameters, 1024 tokens)"
        ),
        note="no module puts the layers together",
    ),
)
