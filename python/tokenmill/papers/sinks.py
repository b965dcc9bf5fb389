"""Papers on attention sinks and calibrated weights."""

from __future__ import annotations

from functools import partial

from .paper import BACKENDS, IMPORTS, Paper

Row = partial(Paper, family="sinks", backends=BACKENDS)
ROWS = (
    Row(
        number=17,
        name="ACT",
        title=(
            "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language "
            "Models without Training through Attention Calibration"
        ),
        authors="Yu et al.",
        arxiv="2406.15765",
        computes=(
            "in chosen heads, keys whose mean weight over the rows that see them is "
            "above 0.1, but for the first such key, keep 0.4 of their weight; what they"
            " lose goes to the other keys in proportion to their weights"
        ),
        call=(
            "tokenmill.sink_calibrated_attention(heads=heads, beta=0.4, threshold=0.1)",
            "tokenmill.attention_column_scores(reduce='visible_mean')",
            "tokenmill.reweighted_attention(causal=True, renormalize='others')",
        ),
        test=(
            "tests/papers/test_17_act.py",
            "tests/dense/test_reweighted_attention.py",
            "tests/select/test_attention_column_scores.py",
        ),
        checked="released code: GATECH-EIC/ACT at a267af7",
        differs=(
            "the release skips the first key above the threshold, which is key 0 only "
            "where that is above it. Its evaluation has the threshold 0.1 "
            "(scripts/evaluation.sh), its chat evaluation 0.15. In a step with a cache "
            "the release sees one row, keeps the sinks among the receivers and adds to "
            "key 0; its evaluation generates one token, so that this never runs there. "
            "Our call computes the rule of the prompt whatever the number of rows."
        ),
        missing=(
            "the search for the heads to calibrate: it scores a model on 900 samples "
            "once for each head, outside of attention; heads= takes its result"
        ),
        claim="up to +7.30 % accuracy (Llama-30B)",
        counted=(
            "operations: only the chosen heads pay for more than one pass "
            "(tests/dense/test_reweighted_attention.py::test_only_chosen_heads_pay), and"
            " no matrix of weights is in memory "
            "(test_the_matrix_of_weights_is_never_in_memory there)"
        ),
        note="calibrate no head of the first two layers and of the last one, as the release does",
        keywords=(
            "attention sink",
            "attention calibration",
            "calibrate heads",
            "training-free",
            "accuracy",
            "redistribute attention",
            "beta",
            "column mean",
            "hidden attention sinks",
            "LLM",
            "attention sinks",
            "LLaMA",
            "calibration",
        ),
        snippet=IMPORTS
        + """\
q = torch.randn(1, 50, 4, 32)
k = v = torch.randn(1, 50, 2, 32)
tm.sink_calibrated_attention(q, k, v, heads=[1, 3], beta=0.4, threshold=0.1).shape
""",
    ),
    Row(
        number=18,
        name="Emergence of sinks",
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        authors="Gu et al.",
        arxiv="2410.10781",
        computes=(
            "attention without a softmax (sigmoid, elu + 1; as they are or divided by "
            "their sum); softmax with one learnable logit or key more"
        ),
        call=(
            "tokenmill.attention(kind='sigmoid')",
            "tokenmill.attention(kind='elu1')",
            "tokenmill.attention(kind='sigmoid', normalize='sum')",
            "tokenmill.attention(sink=logits)",
        ),
        test=("tests/papers/test_18_sinks.py",),
        checked="released code: sail-sg/Attention-Sink at af49727",
        claim="no sinks with sigmoid weights in models of up to 1 B parameters",
        note=(
            "the released code also trains kernels of a small network (mlp), which are "
            "plain PyTorch"
        ),
        keywords=(
            "attention sink",
            "sigmoid attention",
            "first token",
            "key bias",
            "value bias",
            "softmax",
            "normaliser",
            "elu",
            "streaming",
            "KV bias",
            "attention sinks",
        ),
        snippet=IMPORTS
        + """\
q, k, v = torch.randn(3, 1, 6, 2, 16).unbind()
print(tm.attention(q, k, v, kind="sigmoid", normalize="sum", causal=True).shape)
""",
    ),
    Row(
        number=20,
        name="VAR",
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        authors="Kang et al.",
        arxiv="2503.03321",
        computes=(
            "sinks are tokens with massive activations (tau 20) in known dimensions of "
            "the hidden state; in rows after the image whose visual sinks have at most "
            "half of the visual weight, and whose visual weight is at least 0.2, the "
            "weights of all sinks, of text and image, are multiplied by 0.6, and what "
            "that frees goes to the other visual tokens in proportion to their weights"
        ),
        call=(
            (
                "tokenmill.redistributed_attention(image=(begin, end), hidden=hidden, "
                "sink_dims=(2533, 1415), tau=20.0, rho=0.5, min_visual=0.2, p=0.6)"
            ),
            "tokenmill.massive_activations(dims=(2533, 1415), threshold=20.0)",
        ),
        test=(
            "tests/papers/test_20_var.py",
            "tests/dense/test_reweighted_attention.py",
        ),
        checked="released code: seilk/VisAttnSink at 98e62d6",
        differs=(
            "the index said that only visual sinks give; in the release sinks of the "
            "text give too, and we follow it. Its option except_last_layer has no effect"
            " there (the class that reads it has a value of its own), so all layers from"
            " the third on are changed."
        ),
        counted=(
            "no matrix of weights is in memory "
            "(tests/dense/test_reweighted_attention.py::test_the_matrix_of_weights_is_never_in_memory)"
        ),
        note=(
            "a prompt finds sinks from its hidden states, steps of decoding keep them "
            "(sinks=). The image has one place for all requests of a call. sink_dims of "
            "LLaMA-2 7B are (2533, 1415), of 13B (2100, 4743)."
        ),
        keywords=(
            "visual attention sink",
            "attention sink",
            "massive activations",
            "multimodal",
            "LMM",
            "LLaVA",
            "image-centric heads",
            "attention redistribution",
            "hallucination",
            "training-free",
            "visual tokens",
            "attention budget",
        ),
        snippet=IMPORTS
        + """\
q, k, v = (torch.randn(1, 50, 4, 32) for _ in range(3))
hidden = torch.randn(1, 50, 512).clamp(-3, 3)
hidden[0, [0, 7], 100] = 60.0  # the first token and one of the image are sinks
tm.redistributed_attention(q, k, v, image=(5, 41), hidden=hidden, sink_dims=(100,)).shape
""",
    ),
    Row(
        number=36,
        name="PAINT",
        title=(
            "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large "
            "Vision-Language Model"
        ),
        authors="Arif et al.",
        arxiv="2501.12206",
        computes=(
            "the logits z of local and summary tokens of an image become z + 0.7 abs(z)"
            " and z + 0.3 abs(z) in the last row, before the softmax; local tokens are "
            "the quarter that the class token of the vision encoder attends to most in "
            "its first layer, summary tokens the outliers of its second-last layer"
        ),
        call=(
            "tokenmill.paint_tokens(local_share=0.25, whisker=1.5)",
            "tokenmill.amplified_attention(gains=0.7 * local + 0.3 * summary, rows=1, causal=True)",
        ),
        test=(
            "tests/papers/test_36_paint.py",
            "tests/dense/test_reweighted_attention.py",
        ),
        checked="released code: hasanar1f/PAINT at 2a9e8f8",
        differs=(
            "the abstract speaks of learned margins; the release has the constants 0.7 "
            "and 0.3, which we follow. The release chooses tokens by the first image of "
            "a batch and takes them for all; here each image has its own. A summary "
            "token is never local, as in the release."
        ),
        claim="62.3 % fewer hallucinations",
        note=(
            "factors of weights after the softmax (reweighted_attention) cannot reach it: a"
            " test looks for the best two and stays 10 % away. One gain for all tokens of "
            "the image is PAI (Liu et al. 2024). The choice of layers, 2 to 31 of 32, is "
            "the caller's."
        ),
        keywords=(
            "hallucination",
            "vision-language model",
            "LVLM",
            "LLaVA",
            "visual tokens",
            "local tokens",
            "summary tokens",
            "attention boosting",
            "amplify attention",
            "logits",
            "PAI",
            "paying attention to informed tokens",
            "outliers",
            "CLS token",
            "training-free",
            "visual attention",
            "image captioning",
        ),
        snippet=IMPORTS
        + """\
first, late = torch.rand(2, 1, 36)  # attention of the class token to 36 patches, two layers
local, summary = tm.paint_tokens(first, late)
gains = torch.nn.functional.pad(0.7 * local + 0.3 * summary, (5, 9))  # 5 tokens of text before
q, k, v = (torch.randn(1, 50, 4, 32) for _ in range(3))
tm.amplified_attention(q, k, v, gains[:, None], causal=True).shape
""",
    ),
)
