"""Resources that Triton's compiler gives the kernels of attention_decode."""

from __future__ import annotations

import functools

import pytest
import torch
from tier import daily
from triton_compiler import assert_fits, assert_multiplies

import tokenmill as tm
from tokenmill.dense.attention_decode import FORWARD

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# kind and normalize, dtype, head_dim, pages, terms and mask, one query or several, many rows,
# schedule
CASES = daily(
    "softmax:float16:64:",
    "softmax:bfloat16:256:paged,terms,several,rows",
    "sigmoid:float32:128:several",
    "taylor2,sum:float16:64:paged,terms,several",
    "softmax:bfloat16:256:terms,several,rows,stream,masked",
    "taylor2,sum:float16:64:paged,terms,packed",
    "sigmoid:float32:64:several,stream,float8",
    "softmax:bfloat16:128:paged,terms,packed,float8",
    "softmax:bfloat16:576:paged,several",
    full=(
        "softmax:bfloat16:128:paged",
        "softmax:bfloat16:256:paged,terms,several",
        "sigmoid:float16:128:paged,terms",
        "softmax:float32:64:terms,several",
        "softmax:bfloat16:128:paged,masked",
        "softmax:bfloat16:256:terms,several,rows,masked",
        "relu,count:float32:64:several,masked",
        "softmax:bfloat16:128:paged,stream",
        "sigmoid:float32:64:several,stream",
        "softmax:bfloat16:128:paged,packed",
        "softmax:bfloat16:128:paged,float8",
        "softmax:float16:128:terms,several,rows,float8",
        "softmax:float16:576:paged,packed",
    ),
)


def lowered(case, tokens=4096):
    """A call of attention_decode on meta tensors."""
    kind, dtype, head_dim, options = case.split(":")
    dtype, head_dim = getattr(torch, dtype), int(head_dim)
    batch, heads, kv_heads = 4, 32, 8
    empty = functools.partial(torch.empty, device="meta")
    queries = 16 if "rows" in options else 4 if "several" in options else 1
    q = empty(batch, queries, heads, head_dim, dtype=dtype)
    pages = (batch * tokens // 16, 16) if "paged" in options else (batch, tokens)
    cache = empty(*pages, kv_heads, head_dim, dtype=dtype)
    given = {"scale": 0.125, "seqlens_k": empty(batch, dtype=torch.int32)}
    given |= dict(zip(("kind", "normalize"), kind.split(","), strict=False))
    if "packed" in options:
        q, given["cu_seqlens_q"] = q.flatten(0, 1), empty(batch + 1, dtype=torch.int32)
    if "float8" in options:
        scales = empty(*pages, kv_heads)
        cache, given = cache.to(torch.float8_e4m3fn), given | {"k_scale": scales, "v_scale": scales}
    if "paged" in options:
        given["block_table"] = empty(batch, tokens // 16, dtype=torch.int32)
    if "masked" in options:  # the largest mask
        given["mask_ranges"] = empty(batch, heads, queries, 4, 2, dtype=torch.int32)
        for name, n in (("mask_q_spans", queries), ("mask_k_spans", tokens)):
            given[name] = empty(batch, n, 2, dtype=torch.int32)
    if "terms" in options:
        given |= {"score_bias": empty(batch, heads), "score_bias_value": -1.0, "softcap": 5.0}
        given |= {"score_bias_neg_log_n": True, "alibi_slopes": empty(heads), "window_left": 1000}
        given |= {"sink": empty(heads)} if kind == "softmax" else {}
    if "stream" in options:
        given["schedule"] = "stream_k"
    latent = cache[..., :512]
    given |= {"q": q, "k_cache": cache, "v_cache": latent}
    return FORWARD.record(**FORWARD.defaults | given)


def call(case, *sizes):
    from tokenmill.triton_kernels.dense.attention_decode import attention_decode

    return lambda: attention_decode(lowered(case, *sizes))


def test_kernels_compile_without_spills_and_use_tensor_cores(programs):
    streams = [c for c in CASES if "stream" in c]  # a kernel counts their steps first
    packed = [c for c in CASES if "packed" in c]  # no merge kernel
    latent = [c for c in CASES if ":576:" in c]  # one launch per half of the values
    twice = 2 * len(latent) - len([c for c in latent if c in packed])
    assert len(programs) == 2 * len(CASES) + len(streams) - len(packed) + twice
    for program in programs:
        assert_fits(program)
        if program["kernel"] in ("ranges_kernel", "stream_kernel", "attention_kernel"):
            float32_values = ["float32"] if "float8" in program["case"] else []
            assert_multiplies(program, program["case"].split(":")[1], *float32_values)


def test_no_length_compiles_anew(compiles_once):
    cases = [f"softmax:float16:64:{o}" for o in ("paged,masked", "paged,stream", "paged,packed")]
    compiles_once(dict.fromkeys(cases, ((4096,), (1024,), (16,))))


@pytest.mark.parametrize(
    "options", [{}, {"kind": "relu", "normalize": "count"}, {"window": (50, 0)}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_stream_k_gives_what_split_gives(options, masked):
    """Requests have all lengths; a program takes several of them, or a part of one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(6, n, h, 16, generator=g).to(DEVICE) for n, h in ((2, 4), (700, 2), (700, 2))
    )
    lengths = torch.tensor([700, 0, 1, 33, 400, 64], dtype=torch.int32, device=DEVICE)
    mask = None
    if masked:
        begin = torch.randint(0, 600, (6, 4, 2, 2), generator=g, dtype=torch.int32).to(DEVICE)
        mask = tm.masks.ranges(begin, begin + 90)

    def run(schedule):
        return tm.attention_decode(
            q, k, v, seqlens_k=lengths, mask=mask, schedule=schedule, backend="triton", **options
        )

    out = run("stream_k")
    torch.testing.assert_close(out, run("split"), rtol=1e-4, atol=1e-5)
    assert torch.equal(out, run("stream_k"))
