"""Transitive knowledge among many blocks: each waits for the flags of two earlier blocks and learns
from them of all others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from machine import MachineError, machine

STATUS = Path("/proc/self/status")

# One warp per block. Block b writes x[b], waits for the flags b - 1 and b - 7, reads x[b / 2] and
# sets its own flag; HERE is code after that.
CHAIN = """
.visible .entry k(.param .u64 x, .param .u64 flags) {
.reg .b64 %x, %flags, %d<6>;
.reg .b32 %tid, %block, %r<8>;
.reg .pred %first, %p<4>;
ld.param.u64 %x, [x];
ld.param.u64 %flags, [flags];
mov.u32 %tid, %tid.x;
mov.u32 %block, %ctaid.x;
setp.eq.u32 %first, %tid, 0;
mul.wide.u32 %d0, %block, 4;
add.u64 %d1, %d0, %x;
add.u64 %d2, %d0, %flags;
@%first st.global.u32 [%d1], %block;
setp.lt.u32 %p0, %block, 1;
@%p0 bra TELL;
NEAR: ld.acquire.gpu.global.u32 %r0, [%d2-4];
setp.eq.u32 %p0, %r0, 0;
@%p0 bra NEAR;
setp.lt.u32 %p0, %block, 7;
@%p0 bra READ;
FAR: ld.acquire.gpu.global.u32 %r0, [%d2-28];
setp.eq.u32 %p0, %r0, 0;
@%p0 bra FAR;
READ: shr.u32 %r7, %block, 1;
mad.wide.u32 %d3, %r7, 4, %x;
ld.global.u32 %r1, [%d3];
TELL: @%first st.release.gpu.global.u32 [%d2], 1;
setp.eq.u32 %p1, %block, 37;
HERE
ret; }
"""


def launch(blocks: int, behind: str = "") -> None:
    x, flags = np.zeros(blocks, np.uint32), np.zeros(blocks, np.uint32)
    machine.run(CHAIN.replace("HERE", behind), "k", x, flags, grid=blocks, block=32)


def test_knowledge_passes_along() -> None:
    with machine.options(check=1):
        launch(300)
        with pytest.raises(MachineError, match=r"race: .*global.*block \(37, 0, 0\)"):
            launch(300, "@%p1 st.global.u32 [%d1], 0;")  # read by blocks 74 and 75


def peak() -> int:
    """Peak memory of this program in KiB. ru_maxrss starts from the parent's value."""
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1])


def grown(blocks: int) -> int:
    before = peak()
    with machine.options(check=1):
        launch(blocks)
    return peak() - before


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
def test_memory_of_a_chain_is_not_quadratic() -> None:
    """Runs in its own process, so that no earlier test has raised the peak."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); from test_chains import grown;"
    command = [sys.executable, "-c", f"{script} print(grown(6000))", str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1_000 < int(done.stdout) < 100_000  # 700 MB if each block kept a list of all it knows
