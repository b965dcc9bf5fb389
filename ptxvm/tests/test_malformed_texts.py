"""PTX with a few changed tokens: the machine accepts it or reports what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from hopper import kernel
from test_chains import CHAIN
from test_determinism import ROWS
from tier import FULL

HERE = Path(__file__).parent
SEED, TRIES = 1, 20000 if FULL else 1500

DECLARATIONS = """.version 8.0
.target sm_80
.address_size 64
.file 1 "folder/source.cu"
.visible .global .align 8 .u64 places[3] = {words, generic(words)+8, twice};
.global .align 4 .u32 words[2][3] = {{1, 2, 3}, {0x4, 0b101, 6U}};
.const .align 8 .b8 reals[16] = {0xFF(words), 0xFF00(words), 1, 2};
.extern .shared .align 128 .b8 dynamic[];
.shared .align 16 .v4 .f32 fixed[4];
.func (.param .b32 result) twice(.param .b32 value, .param .align 8 .b8 more[16])
{ .reg .b32 %r<3>; ld.param.b32 %r1, [value]; add.s32 %r2, %r1, %r1;
  st.param.b32 [result+0], %r2; ret; }
.visible .entry k(.param .u64 .ptr .global .align 16 p, .param .align 8 .b8 s[24], .param .f32 x)
.maxntid 128, 1, 1 .minnctapersm 2
{
.reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .f32 %f<4>;
.local .align 8 .b8 frame[32];
.loc 1 7 3
mov.u32 %r0, %tid.x; mov.u64 %d0, frame; ld.param.u64 %d1, [p]; ld.param.v2.u32 {%r1, %r2}, [s+8];
cvta.to.global.u64 %d2, %d1; setp.lt.and.s32 %p0|%p1, %r0, 7, !%p2;
@!%p0 bra $L_end;
{ .param .b32 v; .param .align 8 .b8 w[16]; .param .b32 r;
  st.param.b32 [v], %r0; call.uni (r), twice, (v, w); ld.param.b32 %r3, [r]; }
lop3.b32 %r4, %r0, %r1, %r2, 0x96; mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32
  {%f0, %f1, %f2, %f3}, {%r0, %r1}, {%r2}, {%f0, %f1, %f2, %f3};
wmma.load.a.sync.aligned.row.m16n16k16.global.f16
  {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%d2], 16;
cp.async.cg.shared.global [fixed], [%d2], 16, 8; st.global.v2.f32 [%d2+16], {%f0, 0f3F800000};
brx.idx %r4, choices; choices: .branchtargets $L_end, $L_more;
$L_more: atom.global.cas.b32 %r5, [%d2], %r4, 1;
$L_end: ret;
}
"""
WGMMA = kernel(
    """wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %d1, %d2, %p0, 1, 1, 0, 1;
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
 [%r2], [%d0, {%r3, %r4}], [%r5]; mbarrier.init.shared::cta.b64 [bar], 1;
mbarrier.arrive.expect_tx.shared::cta.b64 %d3, [bar], 64; mapa.shared::cluster.u32 %r4, %r2, 1;
ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r6, %r7}, [%r2]; elect.sync %r8|%p3, -1;""",
    cluster=2,
)


def test_malformed_texts_are_taken_or_refused(tmp_path: Path) -> None:
    paths = []
    for i, text in enumerate((DECLARATIONS, WGMMA, ROWS, CHAIN.replace("HERE", ""))):
        paths.append(tmp_path / f"{i}.ptx")
        paths[-1].write_text(text)
    command = [sys.executable, HERE / "fuzz_texts.py", TRIES, SEED, *paths]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.match(rf"{TRIES} texts, (\d+) taken", done.stdout)
    assert found and TRIES // 50 < int(found[1]) < TRIES // 2
