"""Papers with a computation of the kind that the package is for."""

from __future__ import annotations

from .paper import BACKENDS, PLAIN, Paper

POLICIES = "tests/select/test_policies.py"
NEEDLE = "examples/needle.py"
DIGITS = "examples/papers/digits.py"

TABLE = (
    Paper(
        1, "EViT", "Not All Patches are What You Need: Expediting Vision Transformers via Token "
        "Reorganizations", "Liang et al.", "2202.07800",
        "the patches that the class token attends to most, and the others as one: sum_j a_j x_j",
        ("tokenmill.nn.EViTReorganize(keep_rate=0.7)",
         "tokenmill.nn.EViTEncoder(layers=(3, 6, 9), keep_rate=0.7)",
         "tokenmill.nn.keep_rate_schedule(base_rate=0.7, start=10, epochs=100)",
         "tokenmill.gather_fuse"),
        "tests/papers/test_01_evit.py", "examples/vit_tokens.py", BACKENDS,
        "DeiT-S: 50 % more images/s at -0.3 % top-1, keep rate 0.7",
        "gather_fuse of 64 x 197 x 768, 0.7 of the patches: 10.9 times as fast as eager PyTorch",
        "the fused token is a sum, not divided by its weights",
    ),
    Paper(
        2, "iLLaMA", "Adapting LLaMA Decoder to Vision Transformer", "Wang et al.", "2404.06773",
        "(softmax(z) * (alpha + (1 - alpha) tril)) v, alpha from 1 to 0, not renormalised",
        ("tokenmill.soft_causal_attention",),
        "tests/papers/test_02_illama.py", DIGITS, BACKENDS,
        "75.1 % top-1 with 5.7 M parameters, 86.0 % with 310 M",
    ),
    Paper(
        3, "MULTI-LANE", "Less is more: Summarizing Patch Tokens for efficient Multi-Label "
        "Class-Incremental Learning", "De Min et al.", "2405.15633",
        "softmax(S x^T / sqrt(C)) x: learned selectors S against raw patches, one head of C = 768",
        ("tokenmill.nn.SelectorSummary(dim=768, num_selectors=20)",),
        "tests/papers/test_3_selector_summary.py", None, PLAIN,
        "the best multi-label class-incremental learning",
        note="plain PyTorch: heads of 768 channels are wider than the kernels, selectors are few",
    ),
    Paper(
        6, "Landmark Attention", "Landmark Attention: Random-Access Infinite Context Length for "
        "Transformers", "Mohtashami and Jaggi", "2305.16300",
        "a grouped softmax: the tokens of an earlier block share the weight of its landmark; in "
        "decoding, the topk blocks whose landmarks score highest, from a dense or paged cache",
        ("tokenmill.landmark_attention(block=64)", "tokenmill.landmark_decode(block=64)"),
        "tests/sparse/test_landmark_attention.py", None, BACKENDS,
        "LLaMA-7B with a context of 32k, and fewer tokens retrieved",
        note="pays in decoding; landmark_attention is exact, and 3 to 19 % slower than causal",
    ),
    Paper(
        7, "VTC-CLS", "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
        "Wang et al.", "2412.05819",
        "the k patches with the largest attention of the class token, summed over layers, in the "
        "order of the image",
        ("tokenmill.nn.ClsTokenPruning(keep=64)",),
        "tests/tokens/test_nn_class_token.py", None, BACKENDS,
        measured="topk_partition of 64 x 196, k = 137: 2.2 times as fast as torch.topk",
    ),
    Paper(
        8, "TokenSelect", "TokenSelect: Efficient Long-Context Inference and Length Extrapolation "
        "for LLMs via Dynamic Token-Level KV Cache Selection", "Wu et al.", "2411.02886",
        "the k tokens of a cache with the largest sum over heads of softmaxed q.k, beside sink and "
        "recent ones; kept while the cosine of successive queries is high; chunks of a prompt vote "
        "with their mean query; rotated by place in the list, models read more than they were "
        "trained for",
        ("tokenmill.policies.TokenSelect(k=2048, num_sink=128, num_recent=512, threshold=0.9, "
         "chunk=512, rope=(cos, sin))",
         "tokenmill.token_select", "tokenmill.query_similarity_gate",
         "tokenmill.sparse_decode_attention(pos_mode='cache')"),
        "tests/papers/test_08_token_select.py", "examples/papers/extrapolation.py", BACKENDS,
        "attention 23.84 times as fast, 2.28 times end to end",
        "attention to 2048 of 65536 keys: 12.3 times as fast as our dense decode (bfloat16), "
        "without the selection",
    ),
    Paper(
        9, "CCA", "Core Context Aware Attention for Long Context Language Modeling", "Chen et al.",
        "2412.12465",
        "attention to a window and to a core of each group before it, weighted as the last query "
        "of the group weighs its tokens",
        ("tokenmill.core_context_attention(group=16, window=256)",
         "tokenmill.sparse.CoreContextState"),
        "tests/sparse/test_core_context_attention.py", None, BACKENDS,
        note="the paper leaves open where the window begins",
    ),
    Paper(
        10, "Sparsifiner", "Sparsifiner: Learning Sparse Instance-Dependent Attention for "
        "Efficient Vision Transformers", "Wei et al.", "2303.13755",
        "attention of each token to the tokens with the largest low-rank estimate of it",
        ("tokenmill.nn.SparsifinerAttention(keep_rate=0.25, coefficients=8)",),
        "tests/sparse/test_sparsifiner.py", None, BACKENDS,
        "48 to 69 % fewer operations of attention at a loss of 0.4 % or less, above 60 % if "
        "tokens are dropped too",
        note="not faster than dense attention on a CPU unless lists are short: docs/sparse.md",
    ),
    Paper(
        11, "Agent Attention", "Agent Attention: On the Integration of Softmax and Linear "
        "Attention", "Han et al.", "2312.08874",
        "softmax(q A^T + B2) softmax(A k^T + B1) v, A = 49 pooled queries, and a depthwise "
        "convolution of v",
        ("tokenmill.nn.AgentAttention(agents=7)",),
        "tests/papers/test_11_agent_attention.py", None, BACKENDS,
    ),
    Paper(
        12, "BiFormer", "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "Zhu et al.", "2303.08810",
        "attention of each region of a map to the topk regions with the largest products of mean "
        "query and mean key, and a depthwise convolution of v",
        ("tokenmill.nn.BiFormerAttention(regions=7, topk=4, side_dwconv=5)",
         "tokenmill.nn.AttentionLePE", "tokenmill.nn.biformer_tiny", "tokenmill.nn.biformer_small",
         "tokenmill.nn.biformer_base", "tokenmill.bilevel_routing_attention(regions=7, topk=4)"),
        "tests/papers/test_12_biformer.py", "examples/biformer_model.py", BACKENDS,
        measured="map of 150 x 125: 4.8 times as fast as a gather and eager attention, 2.1 times "
        "as a gather and sdpa",
    ),
    Paper(
        14, "xAR", "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation",
        "Ren et al.", "2502.20388",
        "attention that is causal by cells: tokens see all of their own cell and of earlier ones; "
        "a permutation that makes cells of an image contiguous",
        ("tokenmill.attention(mask=masks.segments(cell, rule='not_after'))",
         "tokenmill.gather_tokens"),
        "tests/papers/test_14_xar.py", None, BACKENDS,
        "sampling 20 and 2.2 times as fast, for the whole model",
        note="a way to generate: the model around it is ordinary",
    ),
    Paper(
        16, "TAP, ADL", "Robustifying Token Attention for Vision Transformers", "Guo et al.",
        "2303.11126",
        "a mean of dilated 3 x 3 means, weighted per token; the cosine between rows of attention "
        "and their mean, as a loss",
        ("tokenmill.nn.TokenAwarePooling(num_scales=4)",
         "tokenmill.nn.AttentionDiversificationLoss(threshold=2.0)"),
        "tests/papers/test_16_token_aware_pooling.py", None, BACKENDS,
        "+2.4 % on ImageNet-C",
    ),
    Paper(
        17, "ACT", "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language "
        "Models without Training through Attention Calibration", "Yu et al.", "2406.15765",
        "weights of sink tokens times beta, and what that frees spread over the others in "
        "proportion to their weights",
        ("tokenmill.reweighted_attention(causal=True, renormalize='others')",
         "tokenmill.attention_column_scores(reduce='visible_mean')"),
        "tests/papers/test_17_act.py", None, BACKENDS,
        "up to +7.30 % accuracy (Llama-30B)",
    ),
    Paper(
        18, "Emergence of sinks", "When Attention Sink Emerges in Language Models: An Empirical "
        "View", "Gu et al.", "2410.10781",
        "attention without a normaliser (sigmoid, elu + 1); softmax with one learnable logit or "
        "key more",
        ("tokenmill.attention(kind='sigmoid')", "tokenmill.attention(kind='elu1')",
         "tokenmill.attention(sink=logits)"),
        "tests/papers/test_18_sinks.py", None, BACKENDS,
        "no sinks with sigmoid weights in models of up to 1 B parameters",
    ),
    Paper(
        20, "VAR", "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        "Kang et al.", "2503.03321",
        "weights of visual sinks times p, and what that frees spread over the other visual tokens "
        "in proportion to their weights",
        ("tokenmill.reweighted_attention(causal=True, renormalize='others')",),
        "tests/papers/test_17_act.py", None, BACKENDS,
    ),
    Paper(
        21, "Croc", "Croc: Pretraining Large Multimodal Models with Cross-Modal Comprehension",
        "Xie et al.", "2410.14332",
        "attention in which visual tokens see each other and text is causal",
        ("tokenmill.attention(mask=masks.prefix(lengths))",),
        "tests/papers/test_21_croc.py", None, BACKENDS,
        note="an image behind text takes masks.ranges; the Hungarian assignment is for a solver on "
        "the CPU",
    ),
    Paper(
        22, "IR-Diffusion", "Improving Multi-Subject Consistency in Open-Domain Image Generation "
        "with Isolation and Reposition Attention", "He et al.", "2411.19261",
        "attention in which the queries of a subject do not see the keys of another; keys and "
        "values resampled on a grid",
        ("tokenmill.attention(mask=masks.segments(subject, shared=0))", "tokenmill.gather_tokens"),
        "tests/papers/test_22_isolation.py", None, BACKENDS,
    ),
    Paper(
        23, "CACE", "Focus on the Whole Character: Discriminative Character Modeling for Scene "
        "Text Recognition", "Zhou et al.", "2407.05562",
        "softmax weights times gamma_h^dist(i, j) on a grid, gamma_h = 1 - 2^(-5 - h), not "
        "renormalised",
        ("tokenmill.attention(post_decay=...)", "tokenmill.masks.decay2d(distance='chebyshev')"),
        "tests/papers/test_23_cace.py", DIGITS, BACKENDS,
        "94.1 and 61.6 % accuracy",
        note="log gamma * dist as a bias is something else: it renormalises",
    ),
    Paper(
        24, "RazorAttention", "RazorAttention: Efficient KV Cache Compression Through Retrieval "
        "Heads", "Tang et al.", "2407.15891",
        "retrieval heads keep all keys, others sink and recent ones and the mean of the N that "
        "went, with logit q.k + log N",
        ("tokenmill.policies.RazorAttention(num_sink=4, local=4000, share=5)",
         "tokenmill.kv_cache_compact(compensation=True)"),
        POLICIES, NEEDLE, BACKENDS,
        "caches smaller by 70 %",
    ),
    Paper(
        26, "Active-dormant heads", "Active-Dormant Attention Heads: Mechanistically Demystifying "
        "Extreme-Token Phenomena in LLMs", "Guo et al.", "2410.13835",
        "relu(q.k) in place of softmax",
        ("tokenmill.attention(kind='relu')",),
        "tests/papers/test_26_relu.py", None, BACKENDS,
    ),
    Paper(
        27, "TidalDecode", "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent "
        "Sparse Attention", "Yang et al.", "2410.05076",
        "two layers select the keys with the largest q.k, for each query head, and the layers "
        "behind them attend to those; now and then a full pass corrects the cache of what was "
        "generated",
        ("tokenmill.policies.TidalDecode(budget=256, first=2, correction=9, lists='query')",
         "tokenmill.policies.TidalDecode.correct", "tokenmill.kv_block_scores",
         "tokenmill.topk_select", "tokenmill.sparse_decode_attention"),
        "tests/papers/test_27_tidal_decode.py", NEEDLE, BACKENDS,
        "decoding up to 2.1 times as fast",
        "attention to 2048 of 65536 keys: 12.3 times as fast as our dense decode (bfloat16)",
    ),
    Paper(
        28, "Recycled Attention", "Recycled Attention: Efficient inference for long-context "
        "language models", "Xu et al.", "2411.05787",
        "a full step now and then, or when the query is no longer like that of the last one; the "
        "steps between attend to the keys that it weighed most and to new ones",
        ("tokenmill.policies.RecycledAttention(budget=4096, stride=50)",
         "tokenmill.policies.RecycledAttention(threshold=0.9)",
         "tokenmill.sparse_decode_attention"),
        "tests/papers/test_28_recycled_attention.py", NEEDLE, BACKENDS,
        "as fast as a local window, at twice its quality",
        "attention to 2048 of 65536 keys: 12.3 times as fast as our dense decode (bfloat16)",
    ),
    Paper(
        29, "Expedit", "Expediting Large-Scale Vision Transformer for Dense Prediction without "
        "Fine-tuning", "Liang et al.", "2210.01035",
        "soft k-means in windows of a map, and each token back as a combination of its k nearest "
        "clusters",
        ("tokenmill.nn.ExpeditedBlocks(preset='segmenter')",
         "tokenmill.nn.TokenClustering(preset='sam')",
         "tokenmill.nn.TokenReconstruction(preset='sam', norm='l2')", "tokenmill.cluster_tokens",
         "tokenmill.reconstruct_tokens"),
        "tests/papers/test_29_expedit.py", None, BACKENDS,
        measured="cluster_tokens, 64 x 64 to 32 x 32, C = 192: 11.5 times as fast as the masked "
        "matrix of all pairs; reconstruct_tokens, 4096 of 1024: 1.9 times as cdist, topk, gather",
    ),
    Paper(
        31, "Focus-DETR", "Less is More: Focus Attention for Efficient DETR", "Zheng et al.",
        "2307.12612",
        "the best tokens of each picture, fewer in each layer, gathered, processed and put back; "
        "within a layer, attention among the 300 best",
        ("tokenmill.nn.FocusSelect(ratio=0.5, cascade=(1.0, 0.8, 0.6, 0.6, 0.4, 0.2))",
         "tokenmill.nn.FocusEncoder(topk=300, ratio=0.5)", "tokenmill.nn.FocusScorer",
         "tokenmill.nn.FocusDualAttention(topk=300)"),
        "tests/papers/test_31_focus_detr.py", None, BACKENDS,
        "50.4 AP (+2.2)",
    ),
    Paper(
        33, "HiP", "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention "
        "Pruning", "Lee et al.", "2406.09827",
        "attention to the blocks of keys that a tree search finds for each block of queries",
        ("tokenmill.hip_attention(budget=512, block_q=64, block_k=2)",
         "tokenmill.policies.HiP(dense_layers=3, refresh_interval=8)",
         "tokenmill.hip_block_select", "tokenmill.block_sparse_attention"),
        "tests/papers/test_33_hip.py", "examples/hip_text.py", BACKENDS,
        "time O(S log S) and memory O(S) in the length",
        "32k tokens, budget 512: 9.3 times (float32) and 17.5 times (bfloat16) as fast as causal "
        "sdpa",
        "approximate: what it finds in text is in docs/sparse.md",
    ),
    Paper(
        35, "Learn Your Tokens", "Learn Your Tokens: Word-Pooled Tokenization for Language "
        "Modeling", "Thawani et al.", "2310.11628",
        "a small encoder within each word, whose first p rows stand for the word and are put back "
        "in front of the next one",
        ("tokenmill.nn.WordPooling(dim=768, num_heads=4, num_layers=2, prefix=4)",
         "tokenmill.nn.SegmentPooling(prefix=4)"),
        "tests/papers/test_35_word_pooling.py", None, BACKENDS,
        "accuracy of next words up by more than 300 %",
    ),
    Paper(
        36, "PAINT", "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large "
        "Vision-Language Model", "Arif et al.", "2501.12206",
        "weights of chosen visual tokens times a factor for each head, then renormalised",
        ("tokenmill.reweighted_attention(causal=True, renormalize='all')",),
        "tests/papers/test_36_paint.py", None, BACKENDS,
        "62.3 % fewer hallucinations",
        note="the caller chooses tokens and factors",
    ),
    Paper(
        37, "StreamingLLM", "Efficient Streaming Language Models with Attention Sinks",
        "Xiao et al.", "2309.17453",
        "attention to the first 4 keys and the last ones, rotated by their places in the cache",
        ("tokenmill.policies.StreamingLLM(num_sink=4, num_recent=2044)",
         "tokenmill.sparse_decode_attention(pos_mode='cache')",
         "tokenmill.kv_cache_compact(rerotate=10000.0)"),
        POLICIES, NEEDLE, BACKENDS,
        "up to 22.2 times as fast as recomputing a window; 4 M tokens",
        "2048 of 65536 keys with fused RoPE: 7.9 times as fast as our dense decode (bfloat16)",
    ),
    Paper(
        39, "DToP", "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
        "Tang et al.", "2308.01045",
        "tokens whose likeliest class is above a threshold leave, but the 5 surest of each class",
        ("tokenmill.nn.DToPExit(threshold=0.9, keep=5)", "tokenmill.mask_partition",
         "tokenmill.scatter_tokens"),
        "tests/tokens/test_nn_stages.py", None, BACKENDS,
        "20 to 35 % fewer operations",
    ),
    Paper(
        40, "Sigmoid attention", "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        "Ramapuram et al.", "2409.04431",
        "sigmoid(q k^T / sqrt(d) - log n) v",
        ("tokenmill.sigmoid_attention(score_bias='neg_log_n')",
         "tokenmill.nn.SigmoidAttention(score_bias='neg_log_n')"),
        "tests/papers/test_40_sigmoid_attention.py", DIGITS, BACKENDS,
        "17 % faster than FlashAttention-2 on an H100, forward",
        "S = 2048, float32: 1.29 times as fast as sdpa (which is softmax), 4.54 times as eager",
    ),
    Paper(
        41, "PoNet", "PoNet: Pooling Network for Efficient Token Mixing in Long Sequences",
        "Tan et al.", "2110.02442",
        "(g + the maximum of the segment) * o + the maximum of 3 neighbours, g the attention of "
        "the mean query",
        ("tokenmill.nn.PoNetMixing(num_heads=12)", "tokenmill.nn.segments_of"),
        "tests/tokens/test_nn_stages.py", None, BACKENDS,
        "95.7 % of BERT on GLUE, nearly as fast as FNet",
    ),
    Paper(
        43, "Distributed attention", "A Unified View of Long-Sequence Models towards Modeling "
        "Million-Scale Dependencies", "He and Kabic", "2302.06218",
        "attention of all queries to each shard of the keys, and the results joined",
        ("tokenmill.attention(return_lse=True)", "tokenmill.merge_attention_states"),
        "tests/papers/test_43_shards.py", None, BACKENDS,
        "some 40 times as fast as ordinary attention, on four RTX 4090",
        "merging 4 parts of S = 4096: 4.08 times as fast as eager",
        "in one process: what travels between processes is not in the package",
    ),
    Paper(
        45, "Titans", "Titans: Learning to Memorize at Test Time", "Behrouz et al.", "2501.00663",
        "a memory M_t = (1 - alpha_t) M + S_t, S_t = eta_t S - theta_t grad |k M - v|^2: with a "
        "linear M a gated delta rule with momentum",
        ("tokenmill.titans_memory(chunk_size=64)", "tokenmill.titans_memory_decode",
         "tokenmill.nn.TitansMemory(depth=1)"),
        "tests/papers/test_45_titans.py", "examples/papers/titans.py", BACKENDS,
        "contexts of more than 2 M tokens",
        note="decoding, and a memory of several layers, which is slow, are plain PyTorch",
    ),
    Paper(
        47, "TokenFormer", "TokenFormer: Rethinking Transformer Scaling with Tokenized Model "
        "Parameters", "Wang et al.", "2410.23168",
        "act(x K^T) V against learned keys and values, act = gelu(z sqrt(n) / |z|)",
        ("tokenmill.pattention(activation='l2_norm_gelu')", "tokenmill.nn.Pattention"),
        "tests/papers/test_47_tokenformer.py", "examples/papers/grow_layers.py", PLAIN,
        "grows from 124 M to 1.4 B parameters",
        note="plain PyTorch, in parts, so that the matrix of weights is never whole in memory",
    ),
    Paper(
        49, "Pooling and attention", "Pooling And Attention: What Are Effective Designs For "
        "LLm-Based Embedding Models?", "Tang and Yang", "2409.02727",
        "the last token, the mean, or trainable cross-attention over tokens and over layers",
        ("tokenmill.nn.EmbeddingPooling(method='attention', num_latents=768, num_heads=32)",
         "tokenmill.segment_reduce(reduce='last')"),
        "tests/papers/test_49_embedding_pooling.py", None, BACKENDS,
    ),
    Paper(
        51, "Pointer Networks", "Pointer Networks", "Vinyals et al.", "1506.03134",
        "softmax over inputs of v . tanh(W1 e_j + W2 d_i), and the largest of them",
        ("tokenmill.additive_attention", "tokenmill.pointer_argmax"),
        "tests/papers/test_51_pointer_networks.py", "examples/papers/sort_numbers.py", BACKENDS,
        measured="1024 queries and inputs, A = 128: 21.3 times as fast as eager code, which has "
        "all tangents in memory",
        note="the tangents of all pairs are never in memory",
    ),
    Paper(
        52, "Keyformer", "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient "
        "Generative Inference", "Adnan et al.", "2403.09054",
        "keys by their attention so far, softmax((z + Gumbel noise) / tau) with tau rising, beside "
        "recent ones",
        ("tokenmill.policies.Keyformer(budget=0.6, recent=0.3, tau=1.0, tau_step=0.01)",
         "tokenmill.attention_column_scores(gumbel_tau=1.0, seed=0)"),
        POLICIES, NEEDLE, BACKENDS,
        "latency 2.1 times lower, throughput 2.4 times higher",
        note="the released code also sums scores over the batch; here each request has its own",
    ),
    Paper(
        53, "Retrieval heads", "Retrieval Head Mechanistically Explains Long-Context Factuality",
        "Wu et al.", "2404.15574",
        "for each head, how often the key of the largest weight is the needle's token that is "
        "being copied",
        ("tokenmill.policies.profile_retrieval_heads",
         "tokenmill.attention_row_scores(reduce='none')"),
        "tests/papers/test_53_retrieval_heads.py", NEEDLE, BACKENDS,
        "fewer than 5 % of all heads retrieve",
    ),
    Paper(
        54, "LeanAttention", "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the "
        "Decode-Phase of Transformers", "Sanovar et al.", "2405.10480",
        "exact decode; the keys of all requests and heads cut into equally long ranges, whose "
        "results are joined",
        ("tokenmill.attention_decode(schedule='stream_k')", "tokenmill.merge_attention_states"),
        "tests/papers/test_54_lean.py", None, BACKENDS,
        "2.6 times as fast as FlashAttention-2 on average, 8.33 times at 512k",
        "one query, 65536 keys, bfloat16: 31 times as fast as sdpa, 73 % of the speed of a plain "
        "read",
        "a schedule of the cuda and triton backends; on cpu each request is cut for itself",
    ),
    Paper(
        57, "Lightning Attention", "Various Lengths, Constant Speed: Efficient Language Modeling "
        "with Lightning Attention", "Qin et al.", "2405.17381",
        "sum over s <= t of lambda^(t - s) (q_t.k_s) v_s, by blocks with a state between them",
        ("tokenmill.lightning_attention", "tokenmill.lightning_slopes(convention='paper')",
         "tokenmill.nn.MiniMaxLightningAttention(convention='paper')",
         "tokenmill.linear_attention_decode"),
        "tests/papers/test_57_lightning.py", "examples/long_context_lm.py", BACKENDS,
        "the same tokens/s at any length",
        "8192 tokens, D = 64: 56 times as fast as causal sdpa (float32), 6.7 times as the best "
        "eager chunked form",
    ),
    Paper(
        58, "Based", "Simple linear attention language models balance the recall-throughput "
        "tradeoff", "Arora et al.", "2402.18668",
        "causal linear attention with the features 1, x, x x^T / sqrt(2) of dimension 16, beside "
        "layers of softmax in a window",
        ("tokenmill.linear_attention(feature_map='taylor2', normalize=True)",
         "tokenmill.attention(causal=True, window=(127, 0))"),
        "tests/papers/test_58_based.py", None, BACKENDS,
        "generation 24 times as fast as with FlashAttention-2 (1.3 B parameters, 1024 tokens)",
        note="no module puts the layers together",
    ),
    Paper(
        59, "PoolFormer", "MetaFormer Is Actually What You Need for Vision", "Yu et al.",
        "2111.11418",
        "the mean of 3 x 3 pixels, minus the pixel",
        ("tokenmill.nn.PoolFormerMixing(pool_size=3)",
         "tokenmill.local_pool(subtract_input=True)"),
        "tests/tokens/test_nn_pooling.py", None, BACKENDS,
        "82.1 % top-1 (M36, 8.8 GMAC)",
        "64 x 56 x 56 x 64: 4.6 to 5.0 times as fast as avg_pool2d",
    ),
)  # fmt: skip
