"""Papers on attention with other weights, scores and masks."""

from __future__ import annotations

from .paper import BACKENDS, PLAIN, Paper

ROWS = (
    Paper(
        number=2,
        name="iLLaMA",
        title="Adapting LLaMA Decoder to Vision Transformer",
        authors="Wang et al.",
        arxiv="2404.06773",
        family="dense",
        computes="(softmax(z) * (alpha + (1 - alpha) tril)) v, alpha from 1 to 0, not renormalised",
        call=("tokenmill.soft_causal_attention",),
        test=("tests/papers/test_02_illama.py",),
        example="examples/papers/digits.py",
        backends=BACKENDS,
        claim="75.1 % top-1 with 5.7 M parameters, 86.0 % with 310 M",
    ),
    Paper(
        number=14,
        name="xAR",
        title="Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation",
        authors="Ren et al.",
        arxiv="2502.20388",
        family="dense",
        computes=(
            "attention that is causal by cells: tokens see all of their own cell and of"
            " earlier ones; a permutation that makes cells of an image contiguous"
        ),
        call=(
            "tokenmill.attention(mask=masks.segments(cell, rule='not_after'))",
            "tokenmill.gather_tokens",
        ),
        test=("tests/papers/test_14_xar.py",),
        backends=BACKENDS,
        claim="sampling 20 and 2.2 times as fast, for the whole model",
        note="a way to generate: the model around it is ordinary",
    ),
    Paper(
        number=17,
        name="ACT",
        title=(
            "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language "
            "Models without Training through Attention Calibration"
        ),
        authors="Yu et al.",
        arxiv="2406.15765",
        family="dense",
        computes=(
            "weights of sink tokens times beta, and what that frees spread over the "
            "others in proportion to their weights"
        ),
        call=(
            "tokenmill.reweighted_attention(causal=True, renormalize='others')",
            "tokenmill.attention_column_scores(reduce='visible_mean')",
        ),
        test=("tests/papers/test_17_act.py",),
        backends=BACKENDS,
        claim="up to +7.30 % accuracy (Llama-30B)",
    ),
    Paper(
        number=18,
        name="Emergence of sinks",
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        authors="Gu et al.",
        arxiv="2410.10781",
        family="dense",
        computes=(
            "attention without a normaliser (sigmoid, elu + 1); softmax with one "
            "learnable logit or key more"
        ),
        call=(
            "tokenmill.attention(kind='sigmoid')",
            "tokenmill.attention(kind='elu1')",
            "tokenmill.attention(sink=logits)",
        ),
        test=("tests/papers/test_18_sinks.py",),
        backends=BACKENDS,
        claim="no sinks with sigmoid weights in models of up to 1 B parameters",
    ),
    Paper(
        number=20,
        name="VAR",
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        authors="Kang et al.",
        arxiv="2503.03321",
        family="dense",
        computes=(
            "weights of visual sinks times p, and what that frees spread over the other"
            " visual tokens in proportion to their weights"
        ),
        call=("tokenmill.reweighted_attention(causal=True, renormalize='others')",),
        test=("tests/papers/test_17_act.py",),
        backends=BACKENDS,
    ),
    Paper(
        number=21,
        name="Croc",
        title="Croc: Pretraining Large Multimodal Models with Cross-Modal Comprehension",
        authors="Xie et al.",
        arxiv="2410.14332",
        family="dense",
        computes="attention in which visual tokens see each other and text is causal",
        call=("tokenmill.attention(mask=masks.prefix(lengths))",),
        test=("tests/papers/test_21_croc.py",),
        backends=BACKENDS,
        note=(
            "an image behind text takes masks.ranges; the Hungarian assignment is for a "
            "solver on the CPU"
        ),
    ),
    Paper(
        number=22,
        name="IR-Diffusion",
        title=(
            "Improving Multi-Subject Consistency in Open-Domain Image Generation with "
            "Isolation and Reposition Attention"
        ),
        authors="He et al.",
        arxiv="2411.19261",
        family="dense",
        computes=(
            "attention in which the queries of a subject do not see the keys of "
            "another; keys and values resampled on a grid"
        ),
        call=(
            "tokenmill.attention(mask=masks.segments(subject, shared=0))",
            "tokenmill.gather_tokens",
        ),
        test=("tests/papers/test_22_isolation.py",),
        backends=BACKENDS,
    ),
    Paper(
        number=23,
        name="CACE",
        title=(
            "Focus on the Whole Character: Discriminative Character Modeling for Scene "
            "Text Recognition"
        ),
        authors="Zhou et al.",
        arxiv="2407.05562",
        family="dense",
        computes=(
            "softmax weights times gamma_h^dist(i, j) on a grid, gamma_h = 1 - 2^(-5 - "
            "h), not renormalised"
        ),
        call=(
            "tokenmill.attention(post_decay=...)",
            "tokenmill.masks.decay2d(distance='chebyshev')",
        ),
        test=("tests/papers/test_23_cace.py",),
        example="examples/papers/digits.py",
        backends=BACKENDS,
        claim="94.1 and 61.6 % accuracy",
        note="log gamma * dist as a bias is something else: it renormalises",
    ),
    Paper(
        number=26,
        name="Active-dormant heads",
        title=(
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token "
            "Phenomena in LLMs"
        ),
        authors="Guo et al.",
        arxiv="2410.13835",
        family="dense",
        computes="relu(q.k) in place of softmax",
        call=("tokenmill.attention(kind='relu')",),
        test=("tests/papers/test_26_relu.py",),
        backends=BACKENDS,
    ),
    Paper(
        number=36,
        name="PAINT",
        title=(
            "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large "
            "Vision-Language Model"
        ),
        authors="Arif et al.",
        arxiv="2501.12206",
        family="dense",
        computes="weights of chosen visual tokens times a factor for each head, then renormalised",
        call=("tokenmill.reweighted_attention(causal=True, renormalize='all')",),
        test=("tests/papers/test_36_paint.py",),
        backends=BACKENDS,
        claim="62.3 % fewer hallucinations",
        note="the caller chooses tokens and factors",
    ),
    Paper(
        number=40,
        name="Sigmoid attention",
        title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        authors="Ramapuram et al.",
        arxiv="2409.04431",
        family="dense",
        computes="sigmoid(q k^T / sqrt(d) - log n) v",
        call=(
            "tokenmill.sigmoid_attention(score_bias='neg_log_n')",
            "tokenmill.nn.SigmoidAttention(score_bias='neg_log_n')",
        ),
        test=("tests/papers/test_40_sigmoid_attention.py",),
        example="examples/papers/digits.py",
        backends=BACKENDS,
        claim="17 % faster than FlashAttention-2 on an H100, forward",
        measured=(
            "S = 2048, float32: 1.29 times as fast as sdpa (which is softmax), 4.54 times as eager"
        ),
    ),
    Paper(
        number=43,
        name="Distributed attention",
        title="A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
        authors="He and Kabic",
        arxiv="2302.06218",
        family="dense",
        computes="attention of all queries to each shard of the keys, and the results joined",
        call=(
            "tokenmill.attention(return_lse=True)",
            "tokenmill.merge_attention_states",
        ),
        test=("tests/papers/test_43_shards.py",),
        backends=BACKENDS,
        claim="some 40 times as fast as ordinary attention, on four RTX 4090",
        measured="merging 4 parts of S = 4096: 4.08 times as fast as eager",
        note="in one process: what travels between processes is not in the package",
    ),
    Paper(
        number=47,
        name="TokenFormer",
        title="TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters",
        authors="Wang et al.",
        arxiv="2410.23168",
        family="dense",
        computes="act(x K^T) V against learned keys and values, act = gelu(z sqrt(n) / |z|)",
        call=(
            "tokenmill.pattention(activation='l2_norm_gelu')",
            "tokenmill.nn.Pattention",
        ),
        test=("tests/papers/test_47_tokenformer.py",),
        example="examples/papers/grow_layers.py",
        backends=PLAIN,
        claim="grows from 124 M to 1.4 B parameters",
        note="plain PyTorch, in parts, so that the matrix of weights is never whole in memory",
    ),
    Paper(
        number=51,
        name="Pointer Networks",
        title="Pointer Networks",
        authors="Vinyals et al.",
        arxiv="1506.03134",
        family="dense",
        computes="softmax over inputs of v . tanh(W1 e_j + W2 d_i), and the largest of them",
        call=(
            "tokenmill.additive_attention",
            "tokenmill.pointer_argmax",
        ),
        test=("tests/papers/test_51_pointer_networks.py",),
        example="examples/papers/sort_numbers.py",
        backends=BACKENDS,
        measured=(
            "1024 queries and inputs, A = 128: 21.3 times as fast as eager code, which "
            "has all tangents in memory"
        ),
        note="the tangents of all pairs are never in memory",
    ),
    Paper(
        number=54,
        name="LeanAttention",
        title=(
            "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-"
            "Phase of Transformers"
        ),
        authors="Sanovar et al.",
        arxiv="2405.10480",
        family="dense",
        computes=(
            "exact decode; the keys of all requests and heads cut into equally long "
            "ranges, whose results are joined"
        ),
        call=(
            "tokenmill.attention_decode(schedule='stream_k')",
            "tokenmill.merge_attention_states",
        ),
        test=("tests/papers/test_54_lean.py",),
        backends=BACKENDS,
        claim="2.6 times as fast as FlashAttention-2 on average, 8.33 times at 512k",
        measured=(
            "one query, 65536 keys, bfloat16: 31 times as fast as sdpa, 73 % of the "
            "speed of a plain read"
        ),
        note="a schedule of the cuda and triton backends; on cpu each request is cut for itself",
    ),
)
