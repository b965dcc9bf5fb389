"""Papers on masks, schedules and shards of attention."""

from __future__ import annotations

from functools import partial

from .paper import BACKENDS, IMPORTS, Paper

Row = partial(Paper, family="masks", backends=BACKENDS)
ROWS = (
    Row(
        number=14,
        name="xAR",
        title="Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation",
        authors="Ren et al.",
        arxiv="2502.20388",
        computes=(
            "attention that is causal by cells: tokens see all of their own cell and of"
            " earlier ones; a permutation that makes cells of an image contiguous"
        ),
        call=(
            "tokenmill.attention(mask=masks.segments(cell, rule='not_after'))",
            "tokenmill.gather_tokens",
        ),
        test=(
            "tests/papers/test_14_xar.py",
            "tests/dense/test_attention_masks.py",
            "tests/tokens/test_gather_tokens.py",
        ),
        checked="released code: OliverRensu/xAR at 121e9c9",
        claim="sampling 20 and 2.2 times as fast, for the whole model",
        note="a way to generate: the model around it is ordinary",
        keywords=(
            "next-X prediction",
            "autoregressive image generation",
            "block-causal mask",
            "cell",
            "cluster of patches",
            "flow matching",
            "visual generation",
            "segments",
            "ImageNet",
        ),
        snippet=IMPORTS
        + """\
from tokenmill import masks

cells = torch.arange(64, dtype=torch.int32).div(16, rounding_mode="floor")[None]
q = k = v = torch.randn(1, 64, 4, 32)
out = tm.attention(q, k, v, mask=masks.segments(cells, rule="not_after"))
print(out.shape)  # torch.Size([1, 64, 4, 32])
""",
    ),
    Row(
        number=21,
        name="Croc",
        title="Croc: Pretraining Large Multimodal Models with Cross-Modal Comprehension",
        authors="Xie et al.",
        arxiv="2410.14332",
        computes=(
            "three quarters of the tokens of an image are replaced by learned prompt "
            "tokens that are assigned to them, by the Hungarian algorithm or the "
            "nearest one; attention in which all see what is before the first label, "
            "and the answer is causal"
        ),
        call=(
            (
                "tokenmill.nn.PromptTokenPool(dim=4096, num_prompts=2048, share=0.75, "
                "match='hungarian')"
            ),
            "tokenmill.nn.PromptTokenPool(dim=4096, num_prompts=2048, share=0.75, match='nearest')",
            "tokenmill.attention(mask=masks.prefix(lengths))",
        ),
        test=(
            "tests/papers/test_21_croc.py",
            "tests/dense/test_attention_masks.py",
        ),
        checked="released code: deepglint/Croc at e758f86",
        differs=(
            "the paper assigns by the Hungarian algorithm; the release imports scipy's "
            "solver, does not call it, and takes the nearest prompt token, the same for "
            "several if need be. Both are here, 'hungarian' is the default. The paper "
            "has bidirectional attention among visual tokens, the release a prefix of "
            "all tokens up to the first label; masks.prefix is the release, masks.ranges"
            " the text."
        ),
        missing=(
            "the loss on reconstructed tokens and the caption task are training recipes "
            "around it; the text's cost of an assignment was not readable to us, ours is"
            " the Euclidean distance, as in the release"
        ),
        note="'hungarian' runs on the CPU and needs scipy: pip install 'tokenmill[scipy]'",
        keywords=(
            "large multimodal model",
            "LMM",
            "pretraining",
            "cross-modal comprehension",
            "Hungarian algorithm",
            "assignment",
            "linear_sum_assignment",
            "bipartite matching",
            "prompt token pool",
            "masked visual tokens",
            "mixed attention",
            "bidirectional visual attention",
            "prefix mask",
        ),
        snippet=IMPORTS
        + """\
pool = tm.nn.PromptTokenPool(8, num_prompts=16, match="nearest")
x = torch.nn.functional.normalize(torch.randn(2, 12, 8), dim=-1)
y, assigned = pool(x)
q = k = v = torch.randn(2, 20, 2, 16)
mask = tm.masks.prefix(torch.tensor([12, 15], dtype=torch.int32))
y.shape, tm.attention(q, k, v, mask=mask).shape
""",
    ),
    Row(
        number=22,
        name="IR-Diffusion",
        title=(
            "Improving Multi-Subject Consistency in Open-Domain Image Generation with "
            "Isolation and Reposition Attention"
        ),
        authors="He et al.",
        arxiv="2411.19261",
        computes=(
            "attention of an image to itself and to a reference of each subject: "
            "queries of a subject see the background, themselves and their reference, "
            "whose box is resampled onto the box of the subject"
        ),
        call=(
            "tokenmill.multi_subject_attention(grid=(height, width), mode='nearest')",
            "tokenmill.reposition_tokens(mode='bilinear')",
            "tokenmill.subject_boxes",
            "tokenmill.attention(mask=masks.segments(subject, shared=0))",
        ),
        test=(
            "tests/papers/test_22_isolation.py",
            "tests/dense/test_attention_masks.py",
        ),
        checked=(
            "released code: hehuiguo/DreamStory at 91e1a4b "
            "(src/DreamStory/attention_processor/DreamStoryScaledAttnProcessor.py)"
        ),
        differs=(
            "the release resizes hidden states by torch.nn.functional.interpolate (mode "
            "nearest) and projects them; we resample keys and values, which is the same "
            "where the projections have no bias, as in SDXL. Its masks of subjects"
            " do not overlap, so one id for each token holds them. Half of the queries "
            "of a subject, drawn at random in each layer, see no reference there: "
            "referring= takes them."
        ),
        missing=(
            "cross-attention to the prompts of the references, a blend of ordinary calls"
            " (0.9 of the mean over subjects), and the number added to scores of "
            "references (0 in the release)"
        ),
        note=(
            "masks and boxes stay on the device; where one of interpolate's cells depends "
            "on its float32 factor, ours is the same"
        ),
        keywords=(
            "multi-subject consistency",
            "image generation",
            "diffusion",
            "Stable Diffusion XL",
            "story visualization",
            "DreamStory",
            "isolation attention",
            "reposition attention",
            "reference image",
            "subject fusion",
            "bounding box",
            "resample",
            "interpolate",
            "grid_sample",
            "training-free",
        ),
        snippet=IMPORTS
        + """\
q = k = v = torch.randn(1, 64, 2, 16)  # a picture of 8 x 8
k_ref = v_ref = torch.randn(1, 1, 64, 2, 16)  # a reference of one subject
subject = (torch.arange(64) % 8 < 3).int()[None]  # 3 columns of the picture
ref_mask = (torch.arange(64) >= 32)[None, None]  # the lower half of the reference
tm.multi_subject_attention(q, k, v, k_ref, v_ref, subject, ref_mask, (8, 8)).shape
""",
    ),
    Row(
        number=43,
        name="Distributed attention",
        title="A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
        authors="He and Kabic",
        arxiv="2302.06218",
        computes="attention of all queries to each shard of the keys, and the results joined",
        call=(
            "tokenmill.attention(return_lse=True)",
            "tokenmill.merge_attention_states",
        ),
        test=(
            "tests/papers/test_43_shards.py",
            "tests/dense/test_merge_attention_states.py",
        ),
        checked="text only",
        claim="some 40 times as fast as ordinary attention, on four RTX 4090",
        measured="merging 4 parts of S = 4096: 4.08 times as fast as eager",
        note=(
            "shards are merged by their lse in one process here; between processes, "
            "tokenmill.distributed sends them"
        ),
        keywords=(
            "distributed attention",
            "sequence parallelism",
            "context parallelism",
            "ring attention",
            "several GPUs",
            "million tokens",
            "long sequences",
            "multi-head attention",
            "shards",
            "merge states",
        ),
        snippet=IMPORTS
        + """\
q, k, v = torch.randn(3, 1, 64, 4, 32)
parts = [tm.attention(q, *kv, return_lse=True) for kv in zip(k.chunk(2, 1), v.chunk(2, 1))]
out, lse = tm.merge_attention_states(*(torch.stack(t) for t in zip(*parts)))
print(torch.allclose(out, tm.attention(q, k, v), atol=1e-5))  # True
""",
    ),
    Row(
        number=54,
        name="LeanAttention",
        title=(
            "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-"
            "Phase of Transformers"
        ),
        authors="Sanovar et al.",
        arxiv="2405.10480",
        computes=(
            "exact decode; the keys of all requests and heads cut into equally long "
            "ranges, whose results are joined"
        ),
        call=(
            "tokenmill.attention_decode(schedule='stream_k')",
            "tokenmill.merge_attention_states",
        ),
        test=(
            "tests/papers/test_54_lean.py",
            "tests/dense/test_attention_decode.py",
        ),
        checked="text only",
        claim="2.6 times as fast as FlashAttention-2 on average, 8.33 times at 512k",
        measured=(
            "one query, 32768 keys, bfloat16: 3.3 times as fast as sdpa with the queries of "
            "a group folded, 56 % of the speed of a plain read"
        ),
        counted=(
            "tests/papers/test_54_lean.py reads from the roundings of a call which keys "
            "a range has: with stream_k all ranges have equally many tiles, whatever the"
            " lengths; with split each request is cut for itself"
        ),
        note="a schedule of the cuda and triton backends; on cpu each request is cut for itself",
        keywords=(
            "decode",
            "stream-K",
            "FlashDecoding",
            "split-K",
            "load balance",
            "ragged batch",
            "softmax rescaling",
            "long context",
            "occupancy",
            "KV cache",
        ),
        snippet=IMPORTS
        + """\
q, k, v = torch.randn(2, 1, 2, 16), torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 16)
lengths = torch.tensor([40, 7], dtype=torch.int32)
print(tm.attention_decode(q, k, v, seqlens_k=lengths, schedule="stream_k").shape)
""",
    ),
)
