"""Random structured programs against a model with separate registers for every thread."""

from __future__ import annotations

import os

import numpy as np
import pytest
from machine import machine
from random_programs import DTYPES, RESULTS, Model, Ptx, Writer

PROGRAMS = int(os.environ.get("PTXVM_PROGRAMS", "1000"))
BATCH = 50  # kernels per module
BLOCK, GRID = 40, 2
FILLER = 0x0DD0_5EED_0DD0_5EED
# A small fuel makes lanes take turns between any two instructions.
WAYS = (
    {},
    {"fuel": 7},
    {"fuel": 20, "order": "reverse"},
    {"fuel": 7, "order": "seeded", "seed": 1, "check": 1},
)


@pytest.mark.parametrize("first", range(0, PROGRAMS, BATCH))
def test_random_programs(first: int) -> None:
    writers = [Writer(seed) for seed in range(first, min(first + BATCH, PROGRAMS))]
    module = machine.load("".join(Ptx(w, f"k{i}").text() for i, w in enumerate(writers)))
    given = np.random.default_rng(first).integers(0, 2**32, BLOCK * GRID, dtype=np.uint32)
    given[: BLOCK // 2] %= 16
    results = []
    for options in WAYS:
        with machine.options(watchdog=1, **options):
            for i in range(len(writers)):
                out = np.full((len(given), RESULTS), FILLER, np.uint64)
                module.launch(f"k{i}", given, out, grid=GRID, block=BLOCK)
                results.append(out)
    for i, writer in enumerate(writers):
        with np.errstate(all="ignore"):
            model = Model(writer, given)
        for options, out in zip(WAYS, results[i :: len(writers)], strict=True):
            for column, register in enumerate(writer.results):
                dtype = np.dtype(np.uint8 if register[0] == "p" else DTYPES[register[0]])
                found = np.ascontiguousarray(out[:, column]).view(dtype).reshape(len(given), -1)
                wanted = np.full(len(given), FILLER, np.uint64).view(dtype)
                wanted = wanted.reshape(len(given), -1)[:, 0].copy()
                if model.finished.any():  # else no thread may have reached its definition
                    np.copyto(wanted, model.registers[register], where=model.finished)
                assert np.array_equal(found[:, 0], wanted, equal_nan=dtype.kind == "f"), (
                    f"program {first + i}, {register}, {options}"
                )


@pytest.mark.parametrize("fuel", [7, 20, 20000])
@pytest.mark.parametrize("order", ["forward", "reverse", "seeded"])
def test_flags_of_lanes_that_left_a_loop(order: str, fuel: int) -> None:
    """A 16-bit register of the loop is live when no flag is, and places its lanes differently."""
    text = """
    .visible .entry k(.param .u64 out)
    { .reg .pred %p<3>; .reg .b16 %h<2>; .reg .b32 %r<5>; .reg .b64 %rd<2>;
      mov.u32 %r0, %tid.x; sub.u32 %r0, 31, %r0; mov.u32 %r1, 0;
    TOP:
      cvt.u16.u32 %h0, %r1; cvt.u32.u16 %r2, %h0; add.u32 %r1, %r1, 1;
      and.b32 %r3, %r2, 1; setp.ne.u32 %p0, %r3, 0; setp.lt.u32 %p1, %r2, %r0;
      @%p1 bra TOP;
      selp.u32 %r4, 1, 0, %p0;
      ld.param.u64 %rd0, [out]; mov.u32 %r0, %tid.x; mad.wide.u32 %rd1, %r0, 4, %rd0;
      st.global.u32 [%rd1], %r4; ret; }
    """
    out = np.full(32, 9, np.uint32)
    with machine.options(order=order, fuel=fuel, seed=3, check=1):
        machine.run(text, "k", out)
    assert out.tolist() == [1 - lane % 2 for lane in range(32)]
