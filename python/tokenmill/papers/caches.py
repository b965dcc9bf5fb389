"""Papers on KV caches and decoding."""

from __future__ import annotations

from .paper import BACKENDS, Paper

ROWS = (
    Paper(
        number=8,
        name="TokenSelect",
        title=(
            "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for "
            "LLMs via Dynamic Token-Level KV Cache Selection"
        ),
        authors="Wu et al.",
        arxiv="2411.02886",
        family="caches",
        computes=(
            "the k tokens of a cache with the largest sum over heads of softmaxed q.k, "
            "beside sink and recent ones; kept while the cosine of successive queries "
            "is high; chunks of a prompt vote with their mean query; rotated by place "
            "in the list, models read more than they were trained for"
        ),
        call=(
            (
                "tokenmill.policies.TokenSelect(k=2048, num_sink=128, num_recent=512, "
                "threshold=0.9, chunk=512, rope=(cos, sin))"
            ),
            "tokenmill.token_select",
            "tokenmill.query_similarity_gate",
            "tokenmill.sparse_decode_attention(pos_mode='cache')",
        ),
        test=("tests/papers/test_08_token_select.py",),
        example="examples/papers/extrapolation.py",
        backends=BACKENDS,
        claim="attention 23.84 times as fast, 2.28 times end to end",
        measured=(
            "attention to 2048 of 65536 keys: 12.3 times as fast as our dense decode "
            "(bfloat16), without the selection"
        ),
    ),
    Paper(
        number=24,
        name="RazorAttention",
        title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        authors="Tang et al.",
        arxiv="2407.15891",
        family="caches",
        computes=(
            "retrieval heads keep all keys, others sink and recent ones and the mean of"
            " the N that went, with logit q.k + log N"
        ),
        call=(
            "tokenmill.policies.RazorAttention(num_sink=4, local=4000, share=5)",
            "tokenmill.kv_cache_compact(compensation=True)",
        ),
        test=("tests/select/test_policies.py",),
        example="examples/needle.py",
        backends=BACKENDS,
        claim="caches smaller by 70 %",
    ),
    Paper(
        number=27,
        name="TidalDecode",
        title=(
            "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention"
        ),
        authors="Yang et al.",
        arxiv="2410.05076",
        family="caches",
        computes=(
            "two layers select the keys with the largest q.k, for each query head, and "
            "the layers behind them attend to those; now and then a full pass corrects "
            "the cache of what was generated"
        ),
        call=(
            "tokenmill.policies.TidalDecode(budget=256, first=2, correction=9, lists='query')",
            "tokenmill.policies.TidalDecode.correct",
            "tokenmill.kv_block_scores",
            "tokenmill.topk_select",
            "tokenmill.sparse_decode_attention",
        ),
        test=("tests/papers/test_27_tidal_decode.py",),
        example="examples/needle.py",
        backends=BACKENDS,
        claim="decoding up to 2.1 times as fast",
        measured=(
            "attention to 2048 of 65536 keys: 12.3 times as fast as our dense decode (bfloat16)"
        ),
    ),
    Paper(
        number=28,
        name="Recycled Attention",
        title="Recycled Attention: Efficient inference for long-context language models",
        authors="Xu et al.",
        arxiv="2411.05787",
        family="caches",
        computes=(
            "a full step now and then, or when the query is no longer like that of the "
            "last one; the steps between attend to the keys that it weighed most and to"
            " new ones"
        ),
        call=(
            "tokenmill.policies.RecycledAttention(budget=4096, stride=50)",
            "tokenmill.policies.RecycledAttention(threshold=0.9)",
            "tokenmill.sparse_decode_attention",
        ),
        test=("tests/papers/test_28_recycled_attention.py",),
        example="examples/needle.py",
        backends=BACKENDS,
        claim="as fast as a local window, at twice its quality",
        measured=(
            "attention to 2048 of 65536 keys: 12.3 times as fast as our dense decode (bfloat16)"
        ),
    ),
    Paper(
        number=37,
        name="StreamingLLM",
        title="Efficient Streaming Language Models with Attention Sinks",
        authors="Xiao et al.",
        arxiv="2309.17453",
        family="caches",
        computes=(
            "attention to the first 4 keys and the last ones, rotated by their places in the cache"
        ),
        call=(
            "tokenmill.policies.StreamingLLM(num_sink=4, num_recent=2044)",
            "tokenmill.sparse_decode_attention(pos_mode='cache')",
            "tokenmill.kv_cache_compact(rerotate=10000.0)",
        ),
        test=("tests/select/test_policies.py",),
        example="examples/needle.py",
        backends=BACKENDS,
        claim="up to 22.2 times as fast as recomputing a window; 4 M tokens",
        measured=(
            "2048 of 65536 keys with fused RoPE: 7.9 times as fast as our dense decode (bfloat16)"
        ),
    ),
    Paper(
        number=52,
        name="Keyformer",
        title=(
            "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient "
            "Generative Inference"
        ),
        authors="Adnan et al.",
        arxiv="2403.09054",
        family="caches",
        computes=(
            "keys by their attention so far, softmax((z + Gumbel noise) / tau) with tau"
            " rising, beside recent ones"
        ),
        call=(
            "tokenmill.policies.Keyformer(budget=0.6, recent=0.3, tau=1.0, tau_step=0.01)",
            "tokenmill.attention_column_scores(gumbel_tau=1.0, seed=0)",
        ),
        test=("tests/select/test_policies.py",),
        example="examples/needle.py",
        backends=BACKENDS,
        claim="latency 2.1 times lower, throughput 2.4 times higher",
        note="the released code also sums scores over the batch; here each request has its own",
    ),
    Paper(
        number=53,
        name="Retrieval heads",
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        authors="Wu et al.",
        arxiv="2404.15574",
        family="caches",
        computes=(
            "for each head, how often the key of the largest weight is the needle's "
            "token that is being copied"
        ),
        call=(
            "tokenmill.policies.profile_retrieval_heads",
            "tokenmill.attention_row_scores(reduce='none')",
        ),
        test=("tests/papers/test_53_retrieval_heads.py",),
        example="examples/needle.py",
        backends=BACKENDS,
        claim="fewer than 5 % of all heads retrieve",
    ),
)
