"""mma and ldmatrix: fragments against CuTe's layouts (layouts.json), values against NumPy."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import toolchain
from machine import MachineError, machine

HERE = Path(__file__).parent
LANES = 32
LAYOUTS = json.loads((HERE / "layouts.json").read_text())
ELEMENTS = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, "f32": 1, "s32": 1}  # per register
INT8 = [f"m16n8k{k}.s32.{a}.{b}.s32" for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")]
SHAPES = [name for name in LAYOUTS["mma"] if ".s32." not in name] + INT8


class Mma:
    """An mma instruction with CuTe's layouts of its operands."""

    def __init__(self, name: str) -> None:
        self.name = name
        shape, self.d, self.a, self.b, _ = name.split(".")
        self.k = int(shape.split("k")[1])
        layout = LAYOUTS["mma"][name.replace("u8", "s8")]
        self.places = {
            "a": np.array(layout["a"]),
            "b": np.array(layout["b_transposed"])[..., ::-1],
            "c": np.array(layout["c"]),
        }
        self.counts = {
            "a": self.places["a"].shape[1] // ELEMENTS[self.a],
            "b": self.places["b"].shape[1] // ELEMENTS[self.b],
            "c": self.places["c"].shape[1] // ELEMENTS[self.d],
        }

    def opcode(self, suffix: str = "") -> str:
        shape, *types = self.name.split(".")
        return f"mma.sync.aligned.{shape}.row.col{suffix}.{'.'.join(types)}"

    def fragments(self, operand: str, matrices: np.ndarray, type_: str) -> np.ndarray:
        """Registers [case, lane, register] of matrices [case, row, column] of encoded elements."""
        rows, columns = self.places[operand][..., 0], self.places[operand][..., 1]
        values = np.ascontiguousarray(matrices[:, rows, columns])
        return values.view(np.uint32)

    def matrix(self, registers: np.ndarray, dtype: type) -> np.ndarray:
        """Inverse of fragments(), for D."""
        rows, columns = self.places["c"][..., 0], self.places["c"][..., 1]
        values = registers.view(dtype)
        result = np.zeros((len(registers), 16, 8), dtype)
        result[:, rows, columns] = values
        return result

    def run(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, suffix: str = "") -> np.ndarray:
        """D of encoded A [case, 16, k], B [case, k, 8] and C [case, 16, 8], as C's type."""
        counts = self.counts
        inputs = np.concatenate(
            [
                self.fragments("a", a, self.a),
                self.fragments("b", b, self.b),
                self.fragments("c", c, self.d),
            ],
            axis=2,
        )
        total, out_count = inputs.shape[2], counts["c"]
        names = [f"%r{10 + i}" for i in range(total)]
        results = [f"%r{40 + i}" for i in range(out_count)]
        loads = "".join(f"ld.global.b32 {n}, [%d1+{4 * i}];\n" for i, n in enumerate(names))
        stores = "".join(f"st.global.b32 [%d3+{4 * i}], {n};\n" for i, n in enumerate(results))
        bounds = np.cumsum([0, counts["a"], counts["b"], counts["c"]])
        operands = [names[bounds[i] : bounds[i + 1]] for i in range(3)]
        lists = ", ".join("{" + ", ".join(x) + "}" for x in [results, *operands])
        machine.run(
            f"""
.visible .entry k(.param .u64 in, .param .u64 out) {{
.reg .b32 %r<48>;
.reg .b64 %d<8>;
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mad.lo.u32 %r2, %r1, {LANES}, %r0;
ld.param.u64 %d0, [in];
mad.wide.u32 %d1, %r2, {4 * total}, %d0;
ld.param.u64 %d2, [out];
mad.wide.u32 %d3, %r2, {4 * out_count}, %d2;
{loads}
{self.opcode(suffix)} {lists};
{stores}
ret;
}}
""",
            "k",
            inputs,
            out := np.zeros((len(a), LANES, out_count), np.uint32),
            grid=len(a),
        )
        return self.matrix(out, c.dtype.type)


def encode(x: np.ndarray, type_: str) -> np.ndarray:
    """Encodes values that the type represents exactly."""
    if type_ == "bf16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    numpy_type = {"f16": np.float16, "tf32": np.float32, "f32": np.float32, "s32": np.int32}
    return x.astype(numpy_type.get(type_, np.int8 if type_ == "s8" else np.uint8))


@pytest.mark.parametrize("name", SHAPES)
def test_one_element_of_a_and_b(name):
    """A and B have one nonzero element each: D has their product where A's row meets B's column."""
    mma = Mma(name)
    cases = [(m, k, (m + k) % 8) for m in range(16) for k in range(mma.k)]
    a = np.zeros((len(cases), 16, mma.k))
    b = np.zeros((len(cases), mma.k, 8))
    wanted = np.zeros((len(cases), 16, 8))
    for i, (m, k, n) in enumerate(cases):
        a[i, m, k], b[i, k, n] = 3, 5
        wanted[i, m, n] = 15
    c = encode(np.zeros_like(wanted), mma.d)
    got = mma.run(encode(a, mma.a), encode(b, mma.b), c)
    assert np.array_equal(got.astype(np.float64), wanted)


@pytest.mark.parametrize("name", SHAPES)
def test_whole_matrices(name):
    """Small integers: every sum is exact in every accumulator, in any order."""
    mma = Mma(name)
    rng = np.random.default_rng(1)
    low_a, low_b = (0 if t == "u8" else -8 for t in (mma.a, mma.b))
    a = rng.integers(low_a, 9, (64, 16, mma.k))
    b = rng.integers(low_b, 9, (64, mma.k, 8))
    c = rng.integers(-8, 9, (64, 16, 8))
    got = mma.run(encode(a, mma.a), encode(b, mma.b), encode(c, mma.d))
    limit = 2048 if mma.d == "f16" else 2**24
    assert np.abs(a @ b + c).max() < limit
    assert np.array_equal(got.astype(np.int64), a @ b + c)


@pytest.mark.parametrize("name", [n for n in SHAPES if ".s32." not in n])
def test_rounding(name):
    """Exact sum of random values, correct to the last bits of the accumulator."""
    mma = Mma(name)
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((32, 16, mma.k), (32, mma.k, 8)))
    c = encode(rng.standard_normal((32, 16, 8)), mma.d)
    if mma.a == "bf16":
        a, b = (x.view(np.uint32) & 0xFFFF0000 for x in (a, b))
        a, b = a.view(np.float32), b.view(np.float32)
    if mma.a == "f16":
        a, b = a.astype(np.float16), b.astype(np.float16)
    got = mma.run(encode(a, mma.a), encode(b, mma.b), c).astype(np.float64)
    if mma.a == "tf32":  # the hardware ignores the low 13 bits
        a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
    a, b, c = (x.astype(np.float64) for x in (a, b, c))
    error = np.abs(got - (a @ b + c))
    size = np.abs(a) @ np.abs(b) + np.abs(c)
    unit = 2.0**-11 if mma.d == "f16" else 0
    assert (error <= size * mma.k * 2.0**-24 + np.abs(a @ b + c) * unit * 1.001).all()
    assert error.max() > 0


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_special_values(type_):
    """Infinities, NaN, subnormal operands; every NaN result is the hardware's canonical NaN."""
    mma = Mma(f"m16n8k16.f32.{type_}.{type_}.f32")
    infinity = {"f16": 0x7C00, "bf16": 0x7F80}[type_]
    a, b = np.zeros((4, 16, 16), np.uint16), np.zeros((4, 16, 8), np.uint16)
    one = int(encode(np.ones(1), type_).view(np.uint16)[0])
    a[0, 0, 0], b[0, 0, :] = infinity, one
    a[1, 0, 0], b[1, 0, :] = infinity, 0
    a[2, 0, 0], b[2, 0, :] = 0xFFFF, one
    a[3, 0, 0], b[3, 0, :] = 1, one  # smallest subnormal
    c = np.zeros((4, 16, 8), np.float32)
    dtype = np.float16 if type_ == "f16" else np.uint16
    d = mma.run(a.view(dtype), b.view(dtype), c)
    assert (d[0, 0] == np.inf).all()
    assert (d[1:3, 0].copy().view(np.uint32) == 0x7FFFFFFF).all()
    assert (d[3, 0] == {"f16": 2.0**-24, "bf16": 2.0**-133}[type_]).all()
    assert (d[:, 1:] == 0).all()


@pytest.mark.parametrize("k", [16, 32])
def test_saturation(k):
    mma = Mma(f"m16n8k{k}.s32.s8.s8.s32")
    a = np.full((1, 16, k), 100, np.int8)
    b = np.full((1, k, 8), 100, np.int8)
    c = np.full((1, 16, 8), 2**31 - 1, np.int32)
    assert (mma.run(a, b, c, ".satfinite") == 2**31 - 1).all()
    assert (mma.run(a, b, c) == k * 10000 - 2**31 - 1).all()
    assert (mma.run(-a, b, -c, ".satfinite") == -(2**31)).all()


@pytest.mark.parametrize(
    ("opcode", "counts"),
    [
        ("m16n8k16.row.col.f32.f16.bf16.f32", (4, 4, 2, 4)),
        ("m16n8k16.row.col.f32.f16.f16.f16", (4, 4, 2, 2)),
        ("m16n8k16.row.row.f32.f16.f16.f32", (4, 4, 2, 4)),
        ("m16n8k16.row.col.satfinite.f32.f16.f16.f32", (4, 4, 2, 4)),
        ("m16n8k4.row.col.f32.f16.f16.f32", (4, 1, 1, 4)),
        ("m16n8k16.row.col.f32.f16.f16.f32", (4, 4, 4, 4)),
        ("m8n8k4.row.col.f32.bf16.bf16.f32", (8, 2, 2, 8)),
    ],
)
def test_unknown_forms_are_refused(opcode, counts):
    lists = ", ".join("{" + ", ".join(f"%r{i}" for i in range(n)) + "}" for n in counts)
    text = f".visible .entry k() {{ .reg .b32 %r<8>; mma.sync.aligned.{opcode} {lists}; ret; }}"
    with pytest.raises(MachineError, match=r"k, line 1: mma"):
        machine.run(text, "k")


@pytest.mark.parametrize("order", ["m8n8.{x}", "{x}.m8n8"])
@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
@pytest.mark.parametrize("form", list(LAYOUTS["ldmatrix"]))
def test_ldmatrix(form, space, order):
    """Rows lie anywhere in shared memory; each lane gets the elements of CuTe's layout."""
    layout = LAYOUTS["ldmatrix"][form]
    count, _, trans = form.partition(".")
    n = int(count[1])
    words = order.format(x=count) if not trans else order.format(x=count) + ".trans"
    names = ", ".join(f"%r{10 + i}" for i in range(n))
    stores = "".join(f"st.global.b32 [%d3+{4 * i}], %r{10 + i};\n" for i in range(n))
    text = f"""
.visible .entry k(.param .u64 in, .param .u64 rows, .param .u64 out) {{
.reg .b32 %r<16>;
.reg .b64 %d<12>;
.shared .align 16 .b8 tile[1024];
mov.u32 %r0, %tid.x;
ld.param.u64 %d0, [in];
mad.wide.u32 %d1, %r0, 32, %d0;
mov.u32 %r1, tile;
mad.lo.u32 %r2, %r0, 32, %r1;
ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1];
st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};
ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1+16];
st.shared.v4.b32 [%r2+16], {{%r4, %r5, %r6, %r7}};
bar.sync 0;
ld.param.u64 %d2, [rows];
mad.wide.u32 %d4, %r0, 4, %d2;
ld.global.b32 %r3, [%d4];
add.u32 %r3, %r3, %r1;
cvt.u64.u32 %d5, %r3;
cvta.shared.u64 %d6, %d5;
ldmatrix.sync.aligned.{words}{space}.b16 {{{names}}}, [{"%r3" if space else "%d6"}];
ld.param.u64 %d7, [out];
mad.wide.u32 %d3, %r0, {4 * n}, %d7;
{stores}
ret;
}}
"""
    data = np.random.default_rng(3).permutation(512).astype(np.uint16)
    # Row address of each lane, in 16-byte units; surplus lanes have invalid addresses.
    places = np.random.default_rng(4).permutation(64)[:LANES].astype(np.uint32)
    offsets = places * 16
    offsets[8 * n :] = 0x100000
    out = np.zeros((LANES, n), np.uint32)
    machine.run(text, "k", data, offsets, out)
    rows = data.reshape(64, 8)[places[layout["address_lane"]]]
    wanted = rows.ravel()[np.array(layout["values"])]
    assert np.array_equal(out.view(np.uint16), wanted)


def test_movmatrix():
    text = """
.visible .entry k(.param .u64 p) {
.reg .b32 %r<4>;
.reg .b64 %d<4>;
mov.u32 %r0, %tid.x;
ld.param.u64 %d0, [p];
mad.wide.u32 %d1, %r0, 4, %d0;
ld.global.b32 %r1, [%d1];
movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r1;
st.global.b32 [%d1], %r1;
ret;
}
"""
    data = np.arange(64, dtype=np.uint16).reshape(8, 8)
    wanted = data.T.copy()
    machine.run(text, "k", data)
    assert np.array_equal(data, wanted)


@pytest.mark.parametrize(
    "instruction",
    [
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];",
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 "
        "{%r1,%r1,%r1,%r1}, {%r2,%r2}, {%r2}, {%r2,%r2,%r2,%r2};",
    ],
)
def test_part_of_a_warp_is_refused(instruction):
    text = f"""
.visible .entry k() {{
.reg .b32 %r<4>;
.reg .pred %p<2>;
.shared .align 16 .b8 tile[128];
mov.u32 %r0, %tid.x;
mov.b32 %r2, 0;
setp.lt.u32 %p1, %r0, 16;
@%p1 ret;
{instruction}
ret;
}}
"""
    with pytest.raises(MachineError, match="without all 32 lanes of the warp"):
        machine.run(text, "k")


def test_layouts_are_what_cute_says(tmp_path):
    """The committed layouts.json equals the output of layouts.cu."""
    nvcc, include = toolchain.nvcc(), toolchain.cutlass_include()
    if nvcc is None or include is None:
        pytest.skip("needs nvcc and the CUTLASS headers")
    program = tmp_path / "layouts"
    source = HERE / "layouts.cu"
    subprocess.run(
        [nvcc, "-std=c++17", f"-I{include}", "-o", program, source], check=True, capture_output=True
    )
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert json.loads(printed) == LAYOUTS
