"""Every scalar form of the arithmetic instructions against a model in Python's integers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from bit_forms import bit_forms
from float_forms import float_forms
from forms import SENTINEL, Form, bits_of, guarded, module, operands
from hypothesis import given
from hypothesis import strategies as st
from integer_forms import integer_forms
from machine import Module, machine
from tier import FULL

COUNT = 10240 if FULL else 3072  # operands per form
FORMS = [*integer_forms(), *bit_forms(), *float_forms()]
TYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def identifier(form: Form) -> str:
    return str(form)


def execute(
    loaded: Module, name: str, form: Form, columns: list[np.ndarray], kinds: list[int]
) -> np.ndarray:
    """Result of each row, as an integer; rows become threads."""
    count = len(columns[0])
    out = np.full(count, SENTINEL & ((1 << form.result) - 1), dtype=TYPES[form.result])
    inputs = [c.astype(TYPES[bits]) for c, bits in zip(columns, kinds, strict=True)]
    unused = np.zeros(1, dtype=np.uint64)
    inputs += [unused] * (3 - len(inputs))
    for array in inputs:
        array.flags.writeable = False
    loaded.launch(name, out, *inputs, np.uint32(count), grid=-(-count // 128), block=128)
    return out.astype(np.uint64)


def mismatches(form: Form, got: np.ndarray, expected: list[int], columns: list[np.ndarray]) -> str:
    wanted = np.array(expected, dtype=np.uint64)
    wrong = got != wanted
    if form.nan is not None:
        magnitude = np.uint64((1 << (form.result - 1)) - 1)
        limit = np.uint64(form.nan)
        wrong &= ~((got & magnitude > limit) & (wanted & magnitude > limit))
    rows = np.flatnonzero(wrong)
    shown = "".join(
        f"\n  {', '.join(hex(c[i]) for c in columns)}: got {got[i]:#x}, expected {wanted[i]:#x}"
        for i in rows[:5]
    )
    return f"{len(rows)} of {len(got)} differ:{shown}" if shown else ""


def check(form: Form, columns: list[np.ndarray]) -> None:
    loaded = machine.load(module(form))
    kinds = [bits_of(kind) for kind in form.sources]
    expected = [form.model(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    wrong = mismatches(form, execute(loaded, "plain", form, columns, kinds), expected, columns)
    assert not wrong, f"{form.text} {wrong}"
    executed = guarded(np.arange(len(expected)))
    expected = [x if e else form.kept for x, e in zip(expected, executed, strict=True)]
    wrong = mismatches(form, execute(loaded, "guarded", form, columns, kinds), expected, columns)
    assert not wrong, f"@p {form.text} {wrong}"


@pytest.fixture(autouse=True)
def newest_device() -> Iterator[None]:
    """Some forms require a newer device than sm_80."""
    with machine.options(device="sm_90a"):
        yield


@pytest.mark.parametrize("form", FORMS, ids=identifier)
def test_form(form: Form) -> None:
    check(form, operands(form, COUNT, zlib.crc32(form.text.encode())))


@given(data=st.data())
def test_drawn_operands(data: st.DataObject) -> None:
    """The comparison for any form on operands that Hypothesis can shrink."""
    form = data.draw(st.sampled_from(FORMS))
    rows = st.lists(
        st.tuples(*(st.integers(0, (1 << bits_of(kind)) - 1) for kind in form.sources)),
        min_size=1,
        max_size=40,
    )
    columns = zip(*data.draw(rows), strict=True)
    check(form, [np.array(c, dtype=np.uint64) for c in columns])


def test_every_form_has_its_own_text() -> None:
    texts = [(form.text, form.result) for form in FORMS]
    assert len(set(texts)) == len(texts)


def test_differences_of_bytes_of_two_types() -> None:
    """vabsdiff4 of unsigned a and signed b; no CUDA intrinsic mixes them."""
    text = """.visible .entry k(.param .u64 p) { .reg .b32 %r<5>; .reg .b64 %d<2>;
ld.param.u64 %d0, [p]; mov.b32 %r1, 0x80FF0102; mov.b32 %r2, 0x7F017F80; mov.b32 %r3, 0;
vabsdiff4.u32.u32.s32 %r4, %r1, %r2, %r3; st.global.b32 [%d0], %r4; ret; }"""
    out = np.zeros(1, np.uint32)
    machine.run(text, "k", out)
    assert out[0] == 0x01FE7E82
