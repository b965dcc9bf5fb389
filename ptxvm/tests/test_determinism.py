"""Equal bits and counters in every run, in every order of warps and blocks, and in every build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import build_results
import numpy as np
import pytest
import torch
from machine import machine
from tier import full_only

SOURCES = Path(__file__).parents[1] / "src"

# Row sums with divergent loops, shared memory, shuffles, approximate functions and integer atomics:
# no result depends on the order of threads.
ROWS = """
.visible .entry rows(.param .u64 p_x, .param .u64 p_out, .param .u64 p_count)
{
 .shared .align 4 .f32 partial[4];
 .reg .pred %p<6>; .reg .f32 %f<9>; .reg .b32 %r<12>; .reg .b64 %rd<8>;
 mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r9, partial;
 ld.param.u64 %rd0, [p_x]; ld.param.u64 %rd1, [p_out]; ld.param.u64 %rd2, [p_count];
 mad.lo.u32 %r2, %r1, 500, %r0; mul.wide.u32 %rd3, %r2, 4; add.u64 %rd3, %rd3, %rd0;
 mov.f32 %f0, 0f00000000; mov.u32 %r3, %r0;
LOOP:
 setp.ge.u32 %p0, %r3, 500; @%p0 bra SUM;
 ld.global.f32 %f1, [%rd3];
 ex2.approx.ftz.f32 %f2, %f1; rsqrt.approx.f32 %f3, %f2; fma.rn.f32 %f0, %f1, %f3, %f0;
 setp.lt.f32 %p1, %f1, 0f00000000; @%p1 bra NEXT;
 lg2.approx.f32 %f4, %f2; sub.f32 %f0, %f0, %f4;
 atom.global.add.u32 %r4, [%rd2], 1;
NEXT:
 add.u64 %rd3, %rd3, 512; add.u32 %r3, %r3, 128; bra LOOP;
SUM:
 shfl.sync.bfly.b32 %f5, %f0, 16, 31, -1; add.f32 %f0, %f0, %f5;
 shfl.sync.bfly.b32 %f5, %f0, 8, 31, -1; add.f32 %f0, %f0, %f5;
 shfl.sync.bfly.b32 %f5, %f0, 4, 31, -1; add.f32 %f0, %f0, %f5;
 shfl.sync.bfly.b32 %f5, %f0, 2, 31, -1; add.f32 %f0, %f0, %f5;
 shfl.sync.bfly.b32 %f5, %f0, 1, 31, -1; add.f32 %f0, %f0, %f5;
 shr.u32 %r5, %r0, 5; shl.b32 %r5, %r5, 2; add.u32 %r5, %r5, %r9;
 and.b32 %r6, %r0, 31; setp.eq.u32 %p2, %r6, 0;
 @%p2 st.shared.f32 [%r5], %f0;
 bar.sync 0;
 setp.ne.u32 %p3, %r0, 0; @%p3 ret;
 ld.shared.v4.f32 {%f1, %f2, %f3, %f4}, [%r9];
 add.f32 %f1, %f1, %f2; add.f32 %f1, %f1, %f3; add.f32 %f1, %f1, %f4;
 mul.wide.u32 %rd4, %r1, 4; add.u64 %rd4, %rd4, %rd1;
 st.global.f32 [%rd4], %f1;
 ret;
}
.visible .entry product(.param .u64 p_a, .param .u64 p_b, .param .u64 p_d)
{
 .reg .f32 %f<9>; .reg .b32 %r<12>; .reg .b64 %rd<8>;
 mov.u32 %r0, %tid.x;
 ld.param.u64 %rd0, [p_a]; ld.param.u64 %rd1, [p_b]; ld.param.u64 %rd2, [p_d];
 mad.wide.u32 %rd0, %r0, 16, %rd0; mad.wide.u32 %rd1, %r0, 8, %rd1;
 mad.wide.u32 %rd2, %r0, 16, %rd2;
 ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0]; ld.global.v2.u32 {%r5, %r6}, [%rd1];
 ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd2];
 mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
  {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};
 st.global.v4.f32 [%rd2], {%f1, %f2, %f3, %f4};
 ret;
}
"""


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy aligned to 64 bytes: sectors are counted by address."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def results() -> bytes:
    random = np.random.default_rng(1)
    x = aligned(random.standard_normal((37, 500)).astype(np.float32))
    a = aligned(random.standard_normal((32, 8)).astype(np.float16))
    b = aligned(random.standard_normal((32, 4)).astype(np.float16))
    d = aligned(random.standard_normal((32, 4)).astype(np.float32))
    sums = aligned(np.full(37, np.nan, np.float32))
    count = aligned(np.zeros(1, np.uint32))
    module = machine.load(ROWS)
    module.launch("rows", x, sums, count, grid=37, block=128)
    module.launch("product", a, b, d)
    assert np.isfinite(sums).all() and count[0] == (x >= 0).sum()
    return sums.tobytes() + count.tobytes() + d.tobytes()


def everything() -> bytes:
    """Results, products and reports."""
    return results() + build_results.products() + "\n".join(build_results.reports()).encode()


def test_runs_and_orders() -> None:
    seen: list[tuple[bytes, list[dict[str, Any]]]] = []
    for options in (
        {"order": "forward"},
        {"order": "forward", "fuel": 100000},
        {"order": "reverse"},
        {"order": "reverse", "resident_blocks": 1},
        {"order": "seeded", "seed": 1},
        {"order": "seeded", "seed": 2, "resident_blocks": 37},
        {"order": "seeded", "seed": 2, "check": 1},
    ):
        machine.reset_counters()
        with machine.options(count=1, **options):
            bits = results()
        seen.append((bits, machine.counters()))
    assert [entry == seen[0] for entry in seen] == [True] * len(seen)
    assert [launch["kernel"] for launch in seen[0][1]] == ["rows", "product"]


def test_the_caller_s_handling_of_denormals_does_not_matter() -> None:
    half = """
.visible .entry half(.param .u64 p_x) {
 .reg .f32 %f0; .reg .b64 %rd0;
 ld.param.u64 %rd0, [p_x]; ld.global.f32 %f0, [%rd0];
 mul.rn.f32 %f0, %f0, 0f3F000000; st.global.f32 [%rd0], %f0; ret; }"""
    x = np.array([1e-39], np.float32)
    wanted = x.view(np.uint32) // 2  # before denormals are flushed, which also affects NumPy
    flushed = torch.set_flush_denormal(True)
    try:
        machine.run(half, "half", x, block=1)
    finally:
        torch.set_flush_denormal(False)
    assert flushed and x.view(np.uint32).tolist() == wanted.tolist()


@full_only
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler to build another machine")
@pytest.mark.skipif(not SOURCES.exists(), reason="the sources are not beside the tests")
def test_builds_for_other_instruction_sets(tmp_path: Path) -> None:
    """The tested machine uses this host's instruction set; an AVX2 build gives the same bits and
    the same race reports."""
    flags = ["-std=c++20", "-O2", "-march=x86-64-v3", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fno-trapping-math", "-fPIC", "-fvisibility=hidden", f"-I{SOURCES}"]
    compilers = [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    includes = [
        Path(compiler).resolve().parents[1] / "include" for compiler in compilers if compiler
    ]
    flags += [f"-I{folder}" for folder in includes if (folder / "cuda_runtime_api.h").exists()]
    sources = sorted((SOURCES / "ptxvm").glob("*.cpp"))
    library = tmp_path / "libcudart.so.13"
    compiled = [tmp_path / f"{source.stem}.o" for source in sources]
    jobs = max(1, min(4, (os.cpu_count() or 1)))
    commands = [
        ["g++", *flags, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, compiled, strict=True)
    ]
    running: list[subprocess.Popen[bytes]] = []
    for command in commands:
        if len(running) == jobs:
            assert running.pop(0).wait() == 0
        running.append(subprocess.Popen(command))
    assert all(process.wait() == 0 for process in running)
    version = f"-Wl,--version-script={SOURCES / 'ptxvm' / 'libcudart.map'}"
    subprocess.run(
        ["g++", "-shared", *map(str, compiled), version, "-ldl", "-o", str(library)], check=True
    )
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_determinism import everything;"
        "sys.stdout.buffer.write(everything())"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "PTXVM_LIBRARY": str(library)},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    assert output == everything()
