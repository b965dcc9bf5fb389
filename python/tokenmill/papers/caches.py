"""Papers on KV caches and decoding."""

from __future__ import annotations

from functools import partial

from .paper import BACKENDS, IMPORTS, Paper

Row = partial(Paper, family="caches", backends=BACKENDS)
ROWS = (
    Row(
        number=8,
        name="TokenSelect",
        title=(
            "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for "
            "LLMs via Dynamic Token-Level KV Cache Selection"
        ),
        authors="Wu et al.",
        arxiv="2411.02886",
        computes=(
            "the k tokens of a cache with the largest sum over heads of softmaxed q.k, "
            "next to sink and recent ones; kept while the cosine of successive queries "
            "is high; chunks of a prompt vote with their mean query; rotated by place "
            "in the list, models read more than they were trained for"
        ),
        call=(
            (
                "tokenmill.policies.TokenSelect(k=2048, num_sink=128, num_recent=512, "
                "threshold=0.9, vote_scale=1.0, chunk=512, rope=(cos, sin))"
            ),
            "tokenmill.token_select",
            "tokenmill.query_similarity_gate",
            "tokenmill.sparse_decode_attention(pos_mode='cache')",
        ),
        test=(
            "tests/papers/test_08_token_select.py",
            "tests/select/test_token_select.py",
            "tests/select/test_kv_block_scores.py",
            "tests/sparse/test_sparse_decode_attention.py",
        ),
        example="examples/papers/extrapolation.py",
        checked="released code: pzs19/TokenSelect at 8e1e97f",
        differs=(
            "the release never reuses a selection (threshold=2 here; its branch for it "
            "would fail), votes without a scale (vote_scale=1.0; the default here is the"
            " scale of attention), scores in 16 bits, and reads key head h % Hk for the "
            "votes of head h where its attention reads h // (H / Hk); the last is taken "
            "for a mistake"
        ),
        claim="attention 23.84 times as fast, 2.28 times end to end",
        measured=(
            "attention to 2048 of 65536 keys: 12.3 times as fast as our dense decode "
            "(bfloat16), without the selection"
        ),
        counted=(
            "bytes of a step at 65,536 tokens: 24.4 times fewer than full attention "
            "where the selection is reused, 1.85 where it is made anew: "
            "tests/papers/test_08_token_select.py::test_keys_read"
        ),
        keywords=(
            "KV cache",
            "token selection",
            "soft vote",
            "selection cache",
            "paged",
            "length extrapolation",
            "sparse attention",
            "top-k",
            "prefill",
            "decode",
            "long context",
            "LLM",
            "training-free",
        ),
        snippet=IMPORTS
        + """\
k = torch.randn(1, 64, 2, 16)
layer = tm.policies.TokenSelect(tm.policies.KVCache.like(k, k, 80), k=8, num_sink=2, num_recent=8)
layer.prefill(torch.randn(1, 64, 4, 16), k, k)
layer.step(torch.randn(1, 1, 4, 16), k[:, :1], k[:, :1])
# All keys for the vote, then 18 keys and values:
print(layer.bytes_read)  # 12928
""",
    ),
    Row(
        number=27,
        name="TidalDecode",
        title=(
            "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention"
        ),
        authors="Yang et al.",
        arxiv="2410.05076",
        computes=(
            "two layers select the keys with the largest q.k, for each query head, and "
            "the layers after them attend to those; now and then a full pass corrects "
            "the cache of what was generated"
        ),
        call=(
            "tokenmill.policies.TidalDecode(budget=256, first=2, correction=9, lists='query')",
            "tokenmill.policies.TidalDecode(keep_newest=False)",
            "tokenmill.policies.TidalDecode.correct",
            "tokenmill.kv_block_scores",
            "tokenmill.topk_select",
            "tokenmill.sparse_decode_attention",
        ),
        test=(
            "tests/papers/test_27_tidal_decode.py",
            "tests/select/test_topk_select.py",
            "tests/select/test_kv_block_scores.py",
            "tests/sparse/test_sparse_decode_attention.py",
        ),
        example="examples/needle.py",
        checked="released code: DerrickYLJ/TidalDecode at d67a1bd",
        differs=(
            "model code and kernels of the release differ: in the first the newest token"
            " competes for one of the budget places (keep_newest=False), in the second "
            "it is attended to with them (default). The correction layer is 9 in "
            "modify_llama.py, 13 in enable_tidal.py and the scripts"
        ),
        claim="decoding up to 2.1 times as fast",
        measured=(
            "attention to 2048 of 65536 keys: 12.3 times as fast as our dense decode (bfloat16)"
        ),
        counted=(
            "bytes of 32 layers at the defaults: 5.6 times fewer than full attention at "
            "10,000 tokens, 6.3 at 100,000: "
            "tests/papers/test_27_tidal_decode.py::test_keys_read"
        ),
        keywords=(
            "KV cache",
            "position persistent",
            "sparse attention",
            "token selection",
            "re-selection",
            "cache correction",
            "top-k",
            "decode",
            "layers",
            "long context",
            "LLM",
            "training-free",
        ),
        snippet=IMPORTS
        + """\
k = torch.randn(1, 64, 2, 16)
caches = [tm.policies.KVCache.like(k, k, 80) for _ in range(4)]
layers = tm.policies.stack(tm.policies.TidalDecode, caches, budget=8)
for layer in layers:
    layer.prefill(torch.randn(1, 64, 4, 16), k, k)
    layer.step(torch.randn(1, 1, 4, 16), k[:, :1], k[:, :1])
print([layer.bytes_read for layer in layers])
""",
    ),
    Row(
        number=28,
        name="Recycled Attention",
        title="Recycled Attention: Efficient inference for long-context language models",
        authors="Xu et al.",
        arxiv="2411.05787",
        computes=(
            "a full step now and then chooses the keys that it weighed most, and the "
            "steps between attend to those and to new ones. First version: all new ones"
            " next to them, by stride or by the likeness of queries. Published version "
            "(RefreshKV): the prompt's last query chooses first, and each new token "
            "takes the place of the key with the lowest score"
        ),
        call=(
            "tokenmill.policies.RefreshKV(budget=0.125, stride=10, threshold=0.85, kernel=7)",
            "tokenmill.policies.RecycledAttention(budget=4096, stride=50)",
            "tokenmill.policies.RecycledAttention(threshold=0.9)",
            "tokenmill.kv_block_scores",
            "tokenmill.sparse_decode_attention",
        ),
        test=(
            "tests/papers/test_28_recycled_attention.py",
            "tests/sparse/test_sparse_decode_attention.py",
            "tests/select/test_kv_block_scores.py",
        ),
        example="examples/needle.py",
        checked=(
            "text only (the authors' repository, carriex/refreshkv at 3e41006, has a "
            "README and no code)"
        ),
        differs=(
            "the two versions of the paper: GQA takes the sum over a group in "
            "RecycledAttention and the maximum in RefreshKV, scores are max-pooled over "
            "7 neighbours in the second only, queries are compared with all heads side "
            "by side in every step, or as means over heads in every stride-th step; both"
            " are here, by name"
        ),
        missing="continued pretraining",
        claim="as fast as a local window, at twice its quality",
        measured=(
            "attention to 2048 of 65536 keys: 12.3 times as fast as our dense decode (bfloat16)"
        ),
        counted=(
            "bytes read in ten steps of RefreshKV with a budget of 1/8: 3.8 times fewer "
            "than full attention, where a window of that size reads 8 times fewer: "
            "tests/papers/test_28_recycled_attention.py::test_bytes_of_a_stride"
        ),
        note="published as RefreshKV (ACL 2025); all keys stay in memory",
        keywords=(
            "KV cache",
            "RefreshKV",
            "recycle",
            "attention pattern",
            "top-k",
            "partial cache",
            "long-form generation",
            "query similarity",
            "stride",
            "sparse attention",
            "decode",
            "LLM",
            "long context",
        ),
        snippet=IMPORTS
        + """\
k = torch.randn(1, 64, 2, 16)
layer = tm.policies.RefreshKV(tm.policies.KVCache.like(k, k, 80), stride=5)
layer.prefill(torch.randn(1, 64, 4, 16), k, k)
layer.step(torch.randn(1, 1, 4, 16), k[:, :1], k[:, :1])
# 9 of 65 keys:
print(layer.bytes_read / (65 * 2 * 2 * 16 * 4))  # 0.13846153846153847
""",
    ),
    Row(
        number=37,
        name="StreamingLLM",
        title="Efficient Streaming Language Models with Attention Sinks",
        authors="Xiao et al.",
        arxiv="2309.17453",
        computes=(
            "attention to the first 4 keys and the last ones, rotated by their places in the cache"
        ),
        call=(
            "tokenmill.policies.StreamingLLM(num_sink=4, num_recent=2044, rope=(cos, sin))",
            "tokenmill.policies.StreamingLLM.make_room",
            "tokenmill.sparse_decode_attention(pos_mode='cache')",
            "tokenmill.kv_cache_compact(rerotate=10000.0)",
        ),
        test=(
            "tests/papers/test_37_streaming.py",
            "tests/sparse/test_sparse_decode_attention.py",
            "tests/select/test_kv_cache_compact.py",
        ),
        example="examples/needle.py",
        checked="released code: mit-han-lab/streaming-llm at 2e50426",
        differs=(
            "the release has two orders: eval_long_ppl.py cuts after a token has "
            "attended (num_recent = recent_size + 1 here), run_streaming_llama.py cuts "
            "before a turn by the length of prompt and answer (make_room); the paper "
            "does not say"
        ),
        missing=(
            "models with ALiBi (MPT in the release), and training with a learnable sink "
            "token (attention(sink=) has the logit of one)"
        ),
        claim="up to 22.2 times as fast as recomputing a window; 4 M tokens",
        measured=(
            "2048 of 65536 keys with fused RoPE: 7.9 times as fast as our dense decode (bfloat16)"
        ),
        counted=(
            "slots and bytes of a cache that stays as it is over 299 tokens, and the "
            "bytes of a step: "
            "tests/papers/test_37_streaming.py::test_the_cache_stays_as_small_as_it_is"
        ),
        note="with rope the policy is given queries and keys without rotary embedding",
        keywords=(
            "KV cache",
            "attention sink",
            "sliding window",
            "rolling cache",
            "eviction",
            "infinite length",
            "streaming",
            "rotary",
            "RoPE",
            "position shift",
            "window attention",
            "LLM",
            "decode",
            "attention sinks",
            "KV cache eviction",
        ),
        snippet=IMPORTS
        + """\
angle = torch.arange(64)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
k = torch.randn(1, 40, 2, 16)
cache = tm.policies.KVCache.like(k, k, 48)
layer = tm.policies.StreamingLLM(cache, num_sink=4, num_recent=12, rope=(angle.cos(), angle.sin()))
layer.prefill(torch.randn(1, 40, 4, 16), k, k)
print(layer.step(torch.randn(1, 1, 4, 16), k[:, :1], k[:, :1]).shape, layer.kept)
""",
    ),
    Row(
        number=52,
        name="Keyformer",
        title=(
            "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient "
            "Generative Inference"
        ),
        authors="Adnan et al.",
        arxiv="2403.09054",
        computes=(
            "keys by their attention so far, softmax((z + Gumbel noise) / tau) with tau"
            " rising, with recent ones"
        ),
        call=(
            "tokenmill.policies.Keyformer(budget=0.6, recent=0.3, tau=1.0, tau_step=0.01)",
            "tokenmill.policies.Keyformer(released=True)",
            "tokenmill.attention_column_scores(gumbel_tau=1.0, seed=0)",
        ),
        test=(
            "tests/papers/test_52_keyformer.py",
            "tests/select/test_attention_column_scores.py",
        ),
        example="examples/needle.py",
        checked="released code: d-matrix-ai/keyformer-llm at f327831",
        differs=(
            "the release's mask is one token longer than its scores: the token to come "
            "counts in the budget, and a token that leaves the recent ones is dropped "
            "without being compared, so that what the prompt chose stays to the end; the"
            " paper's algorithm 1 compares it. Default: the paper; released=True: the "
            "release. The release also only masks, and sums scores over the batch; here "
            "keys leave the cache, each request has its own"
        ),
        claim="latency 2.1 times lower, throughput 2.4 times higher",
        counted=(
            "bytes of cache that 100 steps after 200 tokens read at half of the cache: "
            "1.65 times fewer than full attention, 2.48 without the second reading for "
            "scores; the cache is half: "
            "tests/papers/test_52_keyformer.py::test_bytes_of_a_step"
        ),
        note="keys keep the positions that they were rotated to, as in the paper's best setting",
        keywords=(
            "KV cache",
            "KV cache reduction",
            "eviction",
            "key tokens",
            "heavy hitters",
            "Gumbel",
            "noise",
            "temperature",
            "score function",
            "generative inference",
            "LLM",
            "decode",
            "KV cache eviction",
        ),
        snippet=IMPORTS
        + """\
k = torch.randn(1, 40, 2, 16)
layer = tm.policies.Keyformer(tm.policies.KVCache.like(k, k, 48))
layer.prefill(torch.randn(1, 40, 4, 16), k, k)
layer.step(torch.randn(1, 1, 4, 16), k[:, :1], k[:, :1])
# 24 of 41 keys:
print(layer.kept)  # tensor([24], dtype=torch.int32)
""",
    ),
)
