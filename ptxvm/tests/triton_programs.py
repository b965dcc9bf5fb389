"""Triton kernels compiled without a GPU.

python triton_programs.py FOLDER CAPABILITY (80 or 90) writes NAME.ptx and NAME.json: kernel name,
threads, shared memory, scratch memory of a block.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

ALIGNED = ("n", "k", "lda", "ldb", "ldc")


@triton.jit
def matmul(a, b, c, m, n, k, lda, ldb, ldc, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a @ b in f32; sizes need not be multiples of the tile."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, k, BK):
        left = k - start
        x = tl.load(
            a + rows[:, None] * lda + (start + inner)[None, :],
            mask=(rows[:, None] < m) & (inner[None, :] < left),
            other=0.0,
        )
        y = tl.load(
            b + (start + inner)[:, None] * ldb + columns[None, :],
            mask=(inner[:, None] < left) & (columns[None, :] < n),
            other=0.0,
        )
        total = tl.dot(x, y, total, input_precision="tf32")
    tl.store(
        c + rows[:, None] * ldc + columns[None, :],
        total,
        mask=(rows[:, None] < m) & (columns[None, :] < n),
    )


@triton.jit
def attention(
    q, k, v, out, length, scale_log2, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Causal softmax attention of contiguous [heads, length, D]."""
    base = tl.program_id(1).to(tl.int64) * length * D
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    depth = tl.arange(0, D)
    inside = rows[:, None] < length
    queries = tl.load(q + base + rows[:, None] * D + depth[None, :], mask=inside, other=0.0)
    largest = tl.full((BM,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BM,), dtype=tl.float32)
    total = tl.zeros((BM, D), dtype=tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BM, BN):
        columns = start + tl.arange(0, BN)
        place = base + columns[:, None] * D + depth[None, :]
        keys = tl.load(k + place, mask=columns[:, None] < length, other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * scale_log2
        seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] < length)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        weight = weight * shrink + tl.sum(p, 1)
        values = tl.load(v + place, mask=columns[:, None] < length, other=0.0)
        total = tl.dot(p.to(values.dtype), values, total * shrink[:, None])
        largest = new
    tl.store(out + base + rows[:, None] * D + depth[None, :], total / weight[:, None], mask=inside)


@triton.jit
def double_tiles(x, out, m, n, BM: tl.constexpr, BN: tl.constexpr):
    """out = x + x of [m, n], by descriptors that the kernel makes in scratch memory."""
    source = tl.make_tensor_descriptor(x, [m, n], [n, 1], [BM, BN])
    target = tl.make_tensor_descriptor(out, [m, n], [n, 1], [BM, BN])
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    tile = source.load([row, column])
    target.store([row, column], tile + tile)


def compile_kernel(
    function: Any, signature: dict[str, str], constants: dict[str, int], capability: int
) -> Any:
    """Pointers and the sizes in ALIGNED are multiples of 16, so that copies are asynchronous."""
    aligned = [
        i for i, name in enumerate(signature) if signature[name][0] == "*" or name in ALIGNED
    ]
    source = triton.compiler.ASTSource(
        fn=function,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    # wgmma: a wait covers all warps of one warpgroup, and no other warpgroup.
    options = {"num_warps": 8 if capability == 90 else 4, "num_stages": 3}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(folder: Path, capability: int) -> None:
    integers = dict.fromkeys(("m", "n", "k", "lda", "ldb", "ldc"), "i32")
    programs = {}
    for dtype in ("fp16", "bf16", "fp32"):
        pointers = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32"}
        programs[f"matmul_{dtype}"] = (
            *(matmul, pointers | integers),
            {"BM": 64, "BN": 64, "BK": 32},
        )
    for dtype in ("fp16", "bf16"):
        pointers = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
        programs[f"attention_{dtype}"] = (
            *(attention, pointers | {"length": "i32", "scale_log2": "fp32"}),
            {"D": 64, "BM": 64, "BN": 64},
        )
    if capability == 90:
        programs["double_tiles"] = (
            *(double_tiles, {"x": "*fp16", "out": "*fp16", "m": "i32", "n": "i32"}),
            {"BM": 32, "BN": 64},
        )
    for name, (function, signature, constants) in programs.items():
        compiled = compile_kernel(function, signature, constants, capability)
        metadata = compiled.metadata
        (folder / f"{name}.ptx").write_text(compiled.asm["ptx"])
        facts = {
            "name": metadata.name,
            "threads": 32 * metadata.num_warps,
            "shared": metadata.shared,
            "scratch": metadata.global_scratch_size,
        }
        (folder / f"{name}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
