"""Forms that ptxas rejects for older devices are rejected on them, naming the line."""

from __future__ import annotations

import numpy as np
import pytest
from hopper import kernel, sm90
from machine import MachineError, machine

DEVICES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 120: "sm_120"}
# Minimum capability for which ptxas 13.0 assembles each form.
FORMS = {
    "elect.sync %r1|%p1, 0xffffffff;": 90,
    "mbarrier.arrive.shared.b64 %d2, [%d1], 2;": 90,
    "mbarrier.arrive.noComplete.shared.b64 %d2, [%d1], 2;": 80,
    "mov.u32 %r1, %cluster_ctarank;": 90,
    "atom.global.add.noftz.bf16x2 %r1, [%d1], %r2;": 90,
    "red.global.add.noftz.bf16x2 [%d1], %r2;": 90,
    "atom.global.add.noftz.bf16 %h1, [%d1], %h2;": 90,
    "atom.global.add.noftz.f16x2 %r1, [%d1], %r2;": 80,
    "red.global.add.v2.f32 [%d1], {%f3, %f4};": 90,
    "min.xorsign.abs.f32 %f1, %f2, %f3;": 86,
    "max.xorsign.abs.f16 %h1, %h2, %h3;": 86,
    "min.xorsign.abs.bf16x2 %r1, %r2, %r3;": 86,
    "min.NaN.f32 %f1, %f2, %f3;": 80,
    "min.bf16x2 %r1, %r2, %r3;": 80,
    "add.rn.bf16x2 %r1, %r2, %r3;": 90,
    "sub.bf16 %h1, %h2, %h3;": 90,
    "mul.rn.bf16x2 %r1, %r2, %r3;": 90,
    "fma.rn.relu.bf16 %h1, %h2, %h3, %h4;": 80,
    "neg.bf16x2 %r1, %r2;": 80,
    "setp.lt.bf16 %p1, %h1, %h2;": 90,
    "set.lt.u32.bf16 %r3, %h1, %h2;": 90,
    "ex2.approx.ftz.bf16x2 %r1, %r2;": 90,
    "tanh.approx.bf16 %h1, %h2;": 90,
    "tanh.approx.f16 %h1, %h2;": 80,
    "cvt.rn.bf16.f16 %h1, %h2;": 90,
    "cvt.rn.bf16.u32 %h1, %r2;": 90,
    "cvt.f32.bf16 %f1, %h2;": 80,
    "cvt.rz.bf16.f32 %h1, %f2;": 80,
    "cvt.rn.bf16x2.f32 %r1, %f1, %f2;": 80,
    "cvt.rna.tf32.f32 %r1, %f2;": 80,
    "ld.acquire.cluster.global.u32 %r1, [%d1];": 90,
    "fence.acq_rel.cluster;": 90,
    "fence.proxy.tensormap::generic.acquire.gpu [%d1], 128;": 90,
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%d1], "
    "[%r1], 128;": 90,
    "fence.acq_rel.gpu;": 80,
    "atom.global.cas.b16 %h1, [%d1], %h2, %h3;": 80,
    "mma.sync.aligned.m16n8k16.row.col.f32.e4m3.e5m2.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r3},"
    " {%f1, %f2, %f3, %f4};": 89,
    "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%d1, %d2, %d3, %d4}, {%d1, %d2}, {%d3},"
    " {%d1, %d2, %d3, %d4};": 90,
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d1, %d2}, {%d1}, {%d3}, {%d1, %d2};": 80,
    "wmma.mma.sync.aligned.row.col.m8n8k4.rz.f64.f64.f64.f64 {%d1, %d2}, {%d1}, {%d3},"
    " {%d1, %d2};": 80,
}


def program(form: str) -> str:
    """A program that contains the form but never executes it."""
    return f""".visible .entry k() {{
 .reg .b16 %h<5>; .reg .b32 %r<5>; .reg .f32 %f<5>; .reg .b64 %d<5>; .reg .pred %p<2>;
 ret;
 {form}
}}"""


@pytest.mark.parametrize("form", FORMS)
def test_forms_need_a_device(form: str) -> None:
    for capability, name in DEVICES.items():
        with machine.options(device=name):
            if capability >= FORMS[form]:
                machine.run(program(form), "k")
                continue
            with pytest.raises(MachineError) as error:
                machine.run(program(form), "k")
        report = str(error.value)
        assert f"k, line 4: {form.rstrip(';')}: this form needs sm_{FORMS[form]}" in report
        assert report.endswith(f"this is {name}")


def test_a_module_that_a_newer_device_has_run() -> None:
    module = machine.load(kernel("setmaxnreg.dec.sync.aligned.u32 24;"))
    for _ in range(2):
        with sm90():
            module.launch("k", np.zeros(1))
        with pytest.raises(MachineError, match="this form needs sm_90a; this is sm_80"):
            module.launch("k", np.zeros(1))
