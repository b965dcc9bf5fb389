"""Mutants of kernels: the PTX machine's checks or a wrong result must reveal the fault.

Survivors and reasons are in docs/notebook/emulated.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tier import full_only

pytest.importorskip("ptxvm", reason="the package ptxvm is not installed")
import mutant_runner
from ptxvm.mutate import KINDS, Mutation, mutate

from tokenmill._call import library

if not library.emulated_built():
    pytest.skip("only a development build has the kernels", allow_module_level=True)

HERE = Path(__file__).parent
HALF = "merge_kernelI6__halfLi8"
FLOAT = "merge_kernelIfLi4"
SCALAR = "merge_kernelIfLi1"
HALF_BACKWARD = "merge_backward_kernelI6__halfLi8"
FLOAT_BACKWARD = "merge_backward_kernelIfLi4"
MERGE = (HALF, FLOAT, SCALAR, HALF_BACKWARD, FLOAT_BACKWARD)
ATTENTION = "attention_forward_kernelI6__halfLi64ELNS0_7WeightsE0ELb0E"  # softmax, no options
OTHERS = (  # must be clean and right, but are not mutated
    "attention_forward_kernelI13__nv_bfloat16Li64ELNS0_7WeightsE0ELb0E",
    "attention_forward_kernelIfLi64ELNS0_7WeightsE4ELb0E",
)
BACKWARD = [f"15backward_kernelI6__halfLi64ELNS0_4SideE{side}ELNS0_4ModeE0E" for side in (0, 1)]
# Blocks that wait for each other: faults leave the result right if all blocks see one order.
GRID = ("topk_list_kernelIf", "23attention_decode_kernelIfLi64ELb0", "topk_digit_kernelIf")
CHAIN = "recurrence_kernelIfLi64ELb0"
SURVIVORS = 10  # at most one in so many survives

MERGE_KINDS = ("address", "constant", "comparison", "operands", "addend", "lane")
ATTENTION_KINDS = {"barrier dropped": 2, "wait weakened": 1, "wait dropped": 1} | dict.fromkeys(
    (*MERGE_KINDS, "swizzle", "fragment", "matrix"), 5
)
MUTATIONS = {
    "merge": [
        Mutation(kernel, kind, seed) for kernel in MERGE for kind in MERGE_KINDS for seed in (0, 1)
    ],
    "attention": [
        Mutation(ATTENTION, kind, seed)
        for kind, count in ATTENTION_KINDS.items()
        for seed in range(count)
    ],
    "attention_backward": [
        Mutation(kernel, kind, seed)
        for kernel in BACKWARD
        for kind, count in ATTENTION_KINDS.items()
        for seed in range(min(count, 3))
    ],
}


GRID_MUTATIONS = [
    *(Mutation(kernel, "fence dropped", seed) for kernel in GRID[:2] for seed in (0, 1)),
    Mutation(GRID[2], "fence dropped", 0),  # both seeds choose the same place
    *(
        Mutation(CHAIN, kind, seed)
        for kind in ("order relaxed", "scope lowered")
        for seed in (0, 1)
    ),
]


# The rows of merge_case fill this many SMs: merge_kernel runs, not the kernel for few rows.
MULTIPROCESSORS = 16


def run(
    mutations: Sequence[Mutation], multiprocessors: int = MULTIPROCESSORS
) -> list[dict[str, Any]]:
    environment = os.environ | {
        "TOKENMILL_EMULATED": str(library.EMULATED_PATH),
        "PTXVM_SMS": str(multiprocessors),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "mutant_runner.py")],
        input=json.dumps([dataclasses.astuple(m) for m in mutations]),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_original_kernels_are_right_and_clean() -> None:
    for row in run(
        [Mutation(kernel, "original", 0) for kernel in (*MERGE, ATTENTION, *OTHERS, *BACKWARD)]
    ):
        assert row["verdict"] == "survived", row


def test_what_waits_without_the_processor_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutant_runner, "CLOCK", 0.5)
    waits = functools.partial(time.sleep, 60)
    assert mutant_runner.in_child(library.EMULATED_PATH, waits) == ("hang", "")


@pytest.mark.parametrize("family", MUTATIONS)
def test_mutants_are_found(family: str) -> None:
    mutations = MUTATIONS[family]
    rows = run(mutations)
    assert len(rows) == len(mutations) >= 40
    assert {row["verdict"] for row in rows} <= {"survived", "wrong", "report", "hang"}
    survivors = [row for row in rows if row["verdict"] == "survived"]
    listed = "\n".join(
        f"{row['mutation']} line {row['line']}: {row['before']} => {row['after']}"
        for row in survivors
    )
    assert len(survivors) * SURVIVORS <= len(rows), f"survivors:\n{listed}"


@full_only
def test_faults_between_blocks_are_reported() -> None:
    originals = [Mutation(kernel, "original", 0) for kernel in (*GRID, CHAIN)]
    rows = run([*originals, *GRID_MUTATIONS])
    wanted = ["survived"] * len(originals) + ["report"] * len(GRID_MUTATIONS)
    assert [row["verdict"] for row in rows] == wanted, rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutation_is_the_same_every_time_and_keeps_the_length(kind: str) -> None:
    text = """
.visible .entry k()
{
bar.sync 0;
cp.async.wait_group 1;
mov.u32 %r29, 16;
shfl.sync.bfly.b32 %r31|%p11, %r27, %r29, %r28, %r30;
xor.b32 %r1, %r2, 112;
ld.shared.f32 %f1, [%r1+16];
add.s32 %r1, %r1, 64;
@%p1 ld.global.f32 %f1, [%rd1];
setp.lt.s32 %p1, %r1, %r2;
sub.f32 %f1, %f2, %f30;
fma.rn.f32 %f1, %f2, %f3, %f40;
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1,%r2}, {%r5}, {%f1};
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2}, [%r3];
mbarrier.init.shared::cta.b64 [%r1], %r2;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], %r2;
wgmma.wait_group.sync.aligned 1;
mbarrier.arrive.shared::cta.b64 _, [%r1];
$L__1:
mbarrier.try_wait.parity.shared::cta.b64 p, [%r1], %r2;
selp.u32 %r3, 1, 0, p;
LAB_WAIT: mbarrier.try_wait.parity.shared::cta.b64 P1, [%r1], %r2;
@P1 bra DONE;
bra LAB_WAIT;
DONE: fence.proxy.async.shared::cta;
wgmma.wait_group.sync.aligned 1;
cp.async.bulk.wait_group.read 0;
cp.async.bulk.wait_group 0;
st.cg.u64 [%rd1], %rd2;
barrier.cluster.arrive.aligned;
membar.gl;
st.release.gpu.global.u32 [%rd1], %r1;
ret;
}
"""
    first, change = mutate(text, Mutation("k", kind, 0))
    assert (first, change) == mutate(text, Mutation("k", kind, 0))
    assert first != text and len(first) == len(text)
    assert first.count("\n") == text.count("\n")
