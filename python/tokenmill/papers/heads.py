"""Papers on retrieval heads."""

from __future__ import annotations

from functools import partial

from .paper import BACKENDS, IMPORTS, Paper

Row = partial(Paper, family="heads", backends=BACKENDS)
ROWS = (
    Row(
        number=24,
        name="RazorAttention",
        title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        authors="Tang et al.",
        arxiv="2407.15891",
        computes=(
            "retrieval heads keep all keys; the others sink and recent ones, and one "
            "token for the N that went: their mean, with logit q.k + log N. Which "
            "heads: those that attend to earlier occurrences of a token, or to the "
            "token after them, while a model reads random tokens four times"
        ),
        call=(
            (
                "tokenmill.policies.RazorAttention.profile(tokens=2500, repeats=4, echo=0.01, "
                "induction=0.14)"
            ),
            "tokenmill.policies.RazorAttention(num_sink=4, local=4000, share=5)",
            "tokenmill.policies.profile_repeated_tokens",
            "tokenmill.policies.choose_retrieval_heads(echo_part=0.01, induction_part=0.14)",
            "tokenmill.kv_cache_compact(compensation=True)",
        ),
        test=(
            "tests/papers/test_24_razor.py",
            "tests/select/test_kv_cache_compact.py",
        ),
        example="examples/needle.py",
        checked=(
            "released code: mindspore-ai/golden-stick at a50ddc9 (Huawei, the authors' "
            "firm; choice of heads); text for the attention, which that release has "
            "otherwise"
        ),
        differs=(
            "the release adds -1e-5 where it should hide later keys, counts the begin "
            "token once a period as an earlier occurrence, joins the echo heads of one "
            "layer only, has a compensation token without log N, and keeps every "
            "generated token; the paper is followed in all of these "
            "(compensation='single' is the release's token)"
        ),
        missing=(
            "models with ALiBi, whose heads the paper classifies by their slopes: no "
            "policy attends with slopes"
        ),
        claim="caches smaller by over 70 %",
        counted=(
            "68 % fewer bytes with 15 % of 100 key heads whole and 60,000 tokens, 70.4 %"
            " with 12 % (echo and induction heads overlap): "
            "tests/papers/test_24_razor.py::test_bytes_of_the_cache"
        ),
        note="heads must be named: RazorAttention() is an error",
        keywords=(
            "KV cache",
            "KV cache compression",
            "retrieval heads",
            "echo heads",
            "induction heads",
            "compensation token",
            "sink tokens",
            "eviction",
            "head-wise",
            "plug-and-play",
            "long context",
            "training-free",
            "LLM",
            "decode",
        ),
        snippet=IMPORTS
        + """\
k = torch.randn(1, 40, 2, 16)
cache = tm.policies.KVCache.like(k[:, :, :1], k[:, :, :1], 64)
layer = tm.policies.RazorAttention(cache, retrieval=(1,), local=8)
layer.prefill(torch.randn(1, 40, 4, 16), k, k)
layer.step(torch.randn(1, 1, 4, 16), k[:, :1], k[:, :1])
# 12 keys of head 0, all of head 1:
print(layer.kept)  # tensor([[12, 41]], dtype=torch.int32)
""",
    ),
    Row(
        number=53,
        name="Retrieval heads",
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        authors="Wu et al.",
        arxiv="2404.15574",
        computes=(
            "for each head, how often the key of the largest weight is the needle's "
            "token that is being copied"
        ),
        call=(
            "tokenmill.policies.profile_retrieval_heads",
            "tokenmill.policies.profile_retrieval_heads(every_step=True)",
            "tokenmill.integrations.transformers.watch_attention",
            "tokenmill.attention_row_scores(reduce='argmax')",
        ),
        test=(
            "tests/papers/test_53_retrieval_heads.py",
            "tests/select/test_attention_row_scores.py",
        ),
        example="examples/needle.py",
        checked="released code: nightdessert/Retrieval_Head at 3ac171a",
        differs=(
            "the release counts a token in each step that copies it (every_step=True), "
            "the paper once (default)"
        ),
        missing=(
            "the texts, and that only texts with a right answer count (ROUGE-1 recall "
            "above 50): the caller's, as examples/needle.py shows"
        ),
        claim="fewer than 5 % of all heads retrieve",
        note=(
            "watch_attention(model, visit) hands out the queries and keys of a model of "
            "transformers"
        ),
        keywords=(
            "retrieval heads",
            "needle in a haystack",
            "factuality",
            "hallucination",
            "copy",
            "interpretability",
            "attention heads",
            "KV cache",
            "long context",
            "LLM",
            "profiling",
        ),
        snippet=IMPORTS
        + """\
tokens = torch.tensor([[7, 5, 6, 7, 9, 9]])
k = 9 * torch.eye(6).view(1, 6, 1, 6)
q = k[:, 1:3]  # the two steps look at keys 1 and 2
print(tm.policies.profile_retrieval_heads(q, k, tokens, torch.tensor([[5, 6]]), (1, 3)))
""",
    ),
)
