"""What Triton's compiler makes of the kernels of attention_decode.

As a script, it compiles them without a GPU and prints what they use:
python tests/dense/test_attention_decode_triton.py CAPABILITY [softmax:float16:64 ...]
"""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch
import triton_compiler
from triton_compiler import OPERANDS, SHARED, assert_fits, fresh_process, resources

pytest.importorskip("triton")

# kind and normalize, dtype, head dimension, pages, terms and mask, one query or several, many rows
CASES = (
    "softmax:float16:64:",
    "softmax:bfloat16:128:paged",
    "softmax:bfloat16:256:paged,terms,several",
    "softmax:bfloat16:256:paged,terms,several,rows",
    "sigmoid:float16:128:paged,terms",
    "softmax:float32:64:terms,several",
    "sigmoid:float32:128:several",
    "taylor2,sum:float16:64:paged,terms,several",
    "softmax:bfloat16:128:paged,masked",
    "softmax:bfloat16:256:terms,several,rows,masked",
    "relu,count:float32:64:several,masked",
)


def lowered(kind, dtype, head_dim, options, tokens=4096):
    """A call of attention_decode, without data."""
    batch, heads, kv_heads = 4, 32, 8
    empty = functools.partial(torch.empty, device="meta")
    queries = 16 if "rows" in options else 4 if "several" in options else 1
    q = empty(batch, queries, heads, head_dim, dtype=dtype)
    pages = (batch * tokens // 16, 16) if "paged" in options else (batch, tokens)
    cache = empty(*pages, kv_heads, head_dim, dtype=dtype)
    table = empty(batch, tokens // 16, dtype=torch.int32) if "paged" in options else None
    lengths = empty(batch, dtype=torch.int32)
    mask = [None] * 3
    if "masked" in options:  # the most that a mask may be
        ranges = empty(batch, heads, queries, 4, 2, dtype=torch.int32)
        spans = (empty(batch, n, 2, dtype=torch.int32) for n in (queries, tokens))
        mask = [ranges, *spans]
    terms = [None, 0.0, False, *mask, None, None, 0.0, -1]
    if "terms" in options:
        sink = empty(heads) if kind == "softmax" else None
        terms = [empty(batch, heads), -1.0, True, *mask, empty(heads), sink, 5.0, 1000]
    kind, normalize = (*kind.split(","), "none")[:2]
    return (q, cache, cache, lengths, table, kind, normalize, 0.125, *terms, 0, "auto")


def compiled(capability, call):
    from tokenmill.triton_kernels.dense import attention_decode

    return triton_compiler.compiled(capability, lambda: attention_decode.attention_decode(*call))


def main(capability, *cases):
    for case in cases:
        kind, dtype, head_dim, options = case.split(":")
        call = lowered(kind, getattr(torch, dtype), int(head_dim), options)
        for kernel, code in compiled(int(capability), call):
            print(json.dumps({"case": case, **resources(kernel, code)}), flush=True)


run = functools.partial(fresh_process, __file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_without_spills_and_use_tensor_cores(capability, folder):
    text = run(__file__, capability, *CASES, folder=folder)
    found = [json.loads(line) for line in text.splitlines()]
    assert len(found) == 2 * len(CASES)
    for program in found:
        assert_fits(program, capability)
    for program in found[::2]:  # the other kernel merges
        operand = OPERANDS[program["case"].split(":")[1]]
        assert program["products"], program
        for product in program["products"]:
            assert f".f32.{operand}.{operand}" in product, program


def test_no_length_compiles_anew(folder):
    code = """
import torch
from test_attention_decode_triton import compiled, lowered

call = ("softmax", torch.float16, 64, "paged,masked")
calls = [lowered(*call, tokens=n) for n in (4096, 1024, 16)]
first, *others = [[code for _, code in compiled(80, call)] for call in calls]
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    run("-c", code, folder=folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
