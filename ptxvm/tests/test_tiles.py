"""Forms of mma not covered by test_layouts.py, and wmma, against NumPy. Element positions follow
the formulas of the PTX ISA; f16 m8n8k4 follows CuTe's strides, sparsity metadata CUTLASS's
order."""

from __future__ import annotations

import numpy as np
import pytest
from machine import MachineError, machine

BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "f64": 64, "s8": 8, "u8": 8, "s4": 4}
BITS |= {"u4": 4, "b1": 1, "s32": 32, "e4m3": 8, "e5m2": 8}
LANE = np.arange(32)[:, None]


def encode(x: np.ndarray, type_: str) -> np.ndarray:
    """Small integers as bits of a type."""
    if type_ == "f64":
        return x.astype(np.float64).view(np.uint64)
    if type_ in ("f32", "tf32"):
        return x.astype(np.float32).view(np.uint32)
    if type_ == "bf16":
        return x.astype(np.float32).view(np.uint32) >> 16
    if type_ in ("f16", "e5m2"):
        return x.astype(np.float16).view(np.uint16) >> (8 if type_ == "e5m2" else 0)
    if type_ == "e4m3":
        code = {0: 0, 1: 0x38, 2: 0x40, 3: 0x44, 4: 0x48}
        return np.vectorize(lambda v: code[abs(v)] | (0x80 if v < 0 else 0))(x)
    return x.astype(np.int64) & ((1 << BITS[type_]) - 1)


def decode(bits: np.ndarray, type_: str) -> np.ndarray:
    """Values of accumulator bits."""
    if type_ == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    dtype = {"f64": np.float64, "f32": np.float32, "s32": np.int32}[type_]
    unsigned = np.uint64 if type_ == "f64" else np.uint32
    return bits.astype(unsigned).view(dtype).astype(np.float64)


def pack(matrix: np.ndarray, places: tuple[np.ndarray, np.ndarray], type_: str) -> np.ndarray:
    """Registers [lane, register] of a matrix of bits; places: positions of its elements [lane,
    element]."""
    per = max(32 // BITS[type_], 1)
    values = matrix[places].astype(np.uint64).reshape(32, -1, per)
    shifts = np.arange(per, dtype=np.uint64) * np.uint64(BITS[type_] % 64)
    return np.bitwise_or.reduce(values << shifts, axis=2)


def places_of(operand: str, rows: int, columns: int, type_: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [lane, element] of A (m x k), B (k x n) or C (m x n)."""
    per = max(32 // BITS[type_], 1)
    i = np.arange(rows * columns // 32)[None]
    group, thread = LANE >> 2, LANE % 4
    if operand == "c":
        return group + 8 * (i // 2), 2 * thread + i % 2
    if operand == "b":
        return thread * per + i % per + 4 * per * (i // per), group + 0 * i
    if rows == 8:
        return group + 0 * i, thread * per + i % per
    return group + 8 * (i // per % 2), thread * per + i % per + 4 * per * (i // (2 * per))


def run(
    opcode: str, d: str, operands: list[np.ndarray], outputs: int, tail: str = ""
) -> np.ndarray:
    """Registers [lane, output] of D; operands are registers [lane, register], b32 or b64."""
    wide = d == "f64"
    size, base = (8, "%d") if wide else (4, "%r")
    dtype = np.uint64 if wide else np.uint32
    inputs = np.concatenate(operands, axis=1).astype(dtype)
    total = inputs.shape[1]
    names = [f"{base}{10 + i}" for i in range(total)]
    bounds = np.cumsum([0, *(x.shape[1] for x in operands)])
    lists = [names[bounds[i] : bounds[i + 1]] for i in range(len(operands))]
    results = [f"{base}{60 + i}" for i in range(outputs)]
    text = ", ".join("{" + ", ".join(x) + "}" for x in [results, *lists[:3]])
    text += "".join(f", {x[0]}" for x in lists[3:]) + tail
    loads = "".join(f"ld.global.b{8 * size} {n}, [%d1+{size * i}];\n" for i, n in enumerate(names))
    stores = "".join(
        f"st.global.b{8 * size} [%d3+{size * i}], {n};\n" for i, n in enumerate(results)
    )
    out = np.zeros((32, outputs), dtype)
    machine.run(
        f""".visible .entry k(.param .u64 in, .param .u64 out) {{
.reg .b32 %r<80>; .reg .b64 %d<80>;
mov.u32 %r0, %tid.x;
ld.param.u64 %d0, [in];
mad.wide.u32 %d1, %r0, {size * total}, %d0;
ld.param.u64 %d2, [out];
mad.wide.u32 %d3, %r0, {size * outputs}, %d2;
{loads}{opcode} {text};
{stores}ret;
}}""",
        "k",
        inputs,
        out,
    )
    return out


def matrices(m: int, n: int, k: int, a: str, b: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(m + k)
    low = {"u8": 0, "u4": 0, "b1": 0}
    high = {"b1": 2}
    return (
        rng.integers(low.get(a, -4), high.get(a, 5), (m, k)),
        rng.integers(low.get(b, -4), high.get(b, 5), (k, n)),
        rng.integers(-8, 9, (m, n)),
    )


DENSE = [
    ("m8n8k4", "f64.f64.f64.f64"),
    ("m16n8k4", "f64.f64.f64.f64"),
    ("m16n8k8", "f64.f64.f64.f64"),
    ("m16n8k16", "f64.f64.f64.f64"),
    ("m8n8k16", "s32.s8.u8.s32"),
    ("m8n8k32", "s32.u4.s4.s32"),
    ("m16n8k32", "s32.s4.u4.s32"),
    ("m16n8k64", "s32.s4.s4.s32"),
    ("m8n8k128", "s32.b1.b1.s32.xor.popc"),
    ("m16n8k128", "s32.b1.b1.s32.and.popc"),
    ("m16n8k256", "s32.b1.b1.s32.xor.popc"),
    ("m16n8k16", "f32.e4m3.e5m2.f32"),
    ("m16n8k32", "f16.e5m2.e4m3.f16"),
]


def sizes(shape: str) -> tuple[int, int, int]:
    m, rest = shape[1:].split("n")
    n, k = rest.split("k")
    return int(m), int(n), int(k)


@pytest.mark.parametrize(("shape", "types"), DENSE)
def test_dense(shape: str, types: str) -> None:
    m, n, k = sizes(shape)
    d, a_type, b_type, c_type, *bitwise = types.split(".")
    a, b, c = matrices(m, n, k, a_type, b_type)
    operands = [
        pack(encode(x, t), places_of(o, *x.shape, t), t)
        for x, o, t in ((a, "a", a_type), (b, "b", b_type), (c, "c", c_type))
    ]
    with machine.options(device="sm_90a"):
        out = run(f"mma.sync.aligned.{shape}.row.col.{types}", d, operands, operands[2].shape[1])
    products = a @ b
    if bitwise and bitwise[0] == "xor":
        products = (a[:, :, None] ^ b[None]).sum(1)
    assert np.array_equal(unpack(out, m, n, d), products + c)


def unpack(out: np.ndarray, m: int, n: int, d: str) -> np.ndarray:
    places = places_of("c", m, n, d)
    if d == "f16":
        out = np.ascontiguousarray(out.astype(np.uint32)).view(np.uint16)
    result = np.zeros((m, n))
    result[places] = decode(out, d)
    return result


@pytest.mark.parametrize("layouts", ["row.col", "row.row", "col.row", "col.col"])
@pytest.mark.parametrize(("d", "c"), [("f32", "f32"), ("f16", "f16"), ("f32", "f16")])
def test_four_products_of_eight_lanes(d: str, c: str, layouts: str) -> None:
    """CuTe: (lane of eight, element) maps to the dot product of its digits with the strides."""
    pair = np.arange(32) % 16 // 4
    thread = (np.arange(32) % 4 + 4 * (np.arange(32) // 16))[:, None]

    def split(index: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        return index % rows, index // rows

    four, eight = np.arange(4)[None], np.arange(8)[None]
    of_rows = split(thread + 8 * four, 8)  # 8 x 4
    of_columns = split(8 * (thread % 4) + 4 * (thread // 4) + four, 8)
    single = thread % 2 + 16 * (thread // 2 % 2) + 4 * (thread // 4)
    single = single + 8 * (eight % 2) + 2 * (eight // 2 % 2) + 32 * (eight // 4)
    of_c = {"f16": split(thread + 8 * eight, 8), "f32": split(single, 8)}
    a_layout, b_layout = layouts.split(".")
    rng = np.random.default_rng(3)
    a, b, old = (rng.integers(-4, 5, s) for s in ((4, 8, 4), (4, 4, 8), (4, 8, 8)))

    def registers(x: np.ndarray, places: tuple[np.ndarray, np.ndarray], type_: str) -> np.ndarray:
        bits = encode(x, type_)
        flat = np.stack([bits[pair[i]][places[0][i], places[1][i]] for i in range(32)])
        return pack(flat, (LANE, np.arange(flat.shape[1])[None]), type_)

    a_places = of_rows if a_layout == "row" else of_columns
    b_places = of_rows if b_layout == "col" else of_columns
    operands = [
        registers(a, a_places, "f16"),
        registers(b, b_places[::-1], "f16"),
        registers(old, of_c[c], c),
    ]
    out = run(
        f"mma.sync.aligned.m8n8k4.{layouts}.{d}.f16.f16.{c}", d, operands, 8 if d == "f32" else 4
    )
    if d == "f16":
        out = out.view(np.uint16)
    got = np.zeros((4, 8, 8))
    for i in range(32):
        got[pair[i], of_c[d][0][i], of_c[d][1][i]] = decode(out[i], d)
    assert np.array_equal(got, a @ b + old)


SPARSE = [
    ("m16n8k16", "f32.f16.f16.f32", 3),
    ("m16n8k16", "f16.f16.f16.f16", 0),
    ("m16n8k32", "f32.bf16.bf16.f32", 1),
    ("m16n8k8", "f32.tf32.tf32.f32", 2),
    ("m16n8k16", "f32.tf32.tf32.f32", 1),
    ("m16n8k32", "s32.s8.u8.s32", 1),
    ("m16n8k64", "s32.u8.s8.s32", 0),
    ("m16n8k64", "s32.s4.s4.s32", 1),
    ("m16n8k128", "s32.u4.s4.s32", 0),
    ("m16n8k64", "f32.e4m3.e5m2.f32", 0),
]


def thin_out(a: np.ndarray, type_: str, ordered: bool) -> tuple[np.ndarray, ...]:
    """A with half of its elements zeroed, the remaining ones [row, k / 2], and four bits per
    chunk."""
    rng = np.random.default_rng(4)
    rows, k = a.shape
    unit = 2 if BITS[type_] == 4 else 1  # elements that stay together
    chunk = 2 if type_ == "tf32" else 4
    pieces = a.reshape(rows, -1, chunk, unit)
    kept = np.argsort(rng.random(pieces.shape[:3]), axis=2)[..., : chunk // 2]
    if ordered:
        kept.sort(axis=2)
    left = np.take_along_axis(pieces, kept[..., None], 2)
    full = np.zeros_like(pieces)
    np.put_along_axis(full, kept[..., None], left, 2)
    bits = np.where(kept == 1, 14, 4)[..., 0] if chunk == 2 else kept[..., 0] + 4 * kept[..., 1]
    return full.reshape(rows, k), left.reshape(rows, k // 2), bits


def metadata(bits: np.ndarray, type_: str, selector: int) -> np.ndarray:
    """Metadata in units of 16 bits (16-bit elements and tf32) or 32 bits, alternating between rows
    r and r + 8; the units of one r go to lanes 4 r and up, starting at the selector's lane."""
    unit = 4 if BITS[type_] >= 16 else 8  # chunks per unit
    units = bits.reshape(16, -1, unit).astype(np.uint64) << (4 * np.arange(unit, dtype=np.uint64))
    words = units.sum(2).reshape(2, 8, -1).transpose(1, 2, 0)  # [r, unit, upper or lower row]
    words = words[..., 0] | words[..., 1] << 16 if unit == 4 else words.reshape(8, -1)
    lanes = np.random.default_rng(5).integers(0, 2**32, (8, 4))  # unselected values are ignored
    count = words.shape[1]
    lanes[:, selector * count : (selector + 1) * count] = words
    return lanes.reshape(32, 1)


@pytest.mark.parametrize("variant", ["sp", "sp::ordered_metadata"])
@pytest.mark.parametrize(("shape", "types", "selector"), SPARSE)
def test_sparse(shape: str, types: str, selector: int, variant: str) -> None:
    m, n, k = sizes(shape)
    d, a_type, b_type, c_type = types.split(".")
    a, b, c = matrices(m, n, k, a_type, b_type)
    a[a == 0] = 1
    full, left, bits = thin_out(a, a_type, variant != "sp")
    operands = [
        pack(encode(x, t), places_of(o, *x.shape, t), t)
        for x, o, t in ((left, "a", a_type), (b, "b", b_type), (c, "c", c_type))
    ]
    operands.append(metadata(bits, a_type, selector))
    opcode = f"mma.{variant}.sync.aligned.{shape}.row.col.{types}"
    with machine.options(device="sm_89"):
        out = run(opcode, d, operands, operands[2].shape[1], f", {selector}")
    assert np.array_equal(unpack(out, m, n, d), full @ b + c)


def test_metadata_that_names_nothing() -> None:
    operands = [np.zeros((32, n), np.uint32) for n in (2, 2, 4, 1)]
    opcode = "sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    where = "row 0, columns 0 to 3 of A: 0 names one element twice.*thread 0"
    with pytest.raises(MachineError, match=where):
        run(f"mma.sp.{opcode}", "f32", operands, 4, ", 0")
    operands[3][:] = 0x44444444
    operands[3][9] = 0x44044444  # row 10, of selector 1
    where = "row 10, columns 4 to 7 of A: 0 names one element twice.*thread 9"
    with pytest.raises(MachineError, match=where):
        run(f"mma.sp.{opcode}", "f32", operands, 4, ", 1")
    operands[3][:] = 0x11111111  # 1, then 0
    run(f"mma.sp.{opcode}", "f32", operands, 4, ", 0")
    with pytest.raises(MachineError, match="1 is not in ascending order"):
        run(f"mma.sp::ordered_metadata.{opcode}", "f32", operands, 4, ", 0")
    with pytest.raises(MachineError, match="sparsity selector: must be from 0 to 3; got 4"):
        run(f"mma.sp.{opcode}", "f32", operands, 4, ", 4")


def test_f64_and_integers_round_and_saturate() -> None:
    a = np.full((8, 4), 1 + 2.0**-52)
    b, c = np.full((4, 8), 1 - 2.0**-53), np.zeros((8, 8))
    operands = [
        pack(x.view(np.uint64), places_of(o, *x.shape, "f64"), "f64")
        for x, o in ((a, "a"), (b, "b"), (c, "c"))
    ]
    results = []
    for word in ("", ".rz", ".rp"):
        opcode = f"mma.sync.aligned.m8n8k4.row.col{word}.f64.f64.f64.f64"
        results.append(run(opcode, "f64", operands, 2).view(np.float64)[0, 0])
    exact = 4 * (1 + 2.0**-53)  # minus 2**-103
    assert results[1] == 4 and results[2] > exact and results[0] in (4.0, np.nextafter(4.0, 5))
    full = [np.full((32, n), 0x77777777, np.uint32) for n in (2, 1)]
    full.append(np.full((32, 4), 2**31 - 1, np.uint32))
    opcode = "mma.sync.aligned.m16n8k32.row.col{}.s32.s4.s4.s32"
    assert (run(opcode.format(".satfinite"), "s32", full, 4) == 2**31 - 1).all()
    assert (run(opcode.format(""), "s32", full, 4).view(np.int32) == 32 * 49 - 2**31 - 1).all()


# Shape, types of D, A, C, modifiers before and after.
WMMA = [
    *(
        (s, d, "f16", c)
        for s in ("m16n16k16", "m32n8k16", "m8n32k16")
        for d, c in (("f32", "f32"), ("f16", "f16"), ("f32", "f16"))
    ),
    *((s, "f32", "bf16", "f32") for s in ("m16n16k16", "m32n8k16", "m8n32k16")),
    *((s, "s32", t, "s32") for s in ("m16n16k16", "m32n8k16", "m8n32k16") for t in ("s8", "u8")),
    ("m16n16k8", "f32", "tf32", "f32"),
    ("m8n8k4", "f64", "f64", "f64"),
    ("m8n8k32", "s32", "s4", "s32"),
    ("m8n8k32", "s32", "u4", "s32"),
    ("m8n8k128", "s32", "b1", "s32"),
]


def wmma_registers(shape: str, operand: str, type_: str) -> int:
    m, n, k = sizes(shape)
    if type_ == "f16" and operand in "ab":
        return 8
    elements = {"a": m * k, "b": k * n, "c": m * n}[operand]
    return elements * min(BITS[type_], 64) // 32 // (64 if type_ == "f64" else 32)


def to_memory(x: np.ndarray, type_: str, row_major: bool, stride: int) -> np.ndarray:
    """Bytes of a matrix of bits, with `stride` elements from one row or column to the next."""
    lines = x if row_major else x.T
    padded = np.zeros((len(lines), stride), np.uint64)
    padded[:, : lines.shape[1]] = lines
    bits = BITS[type_]
    if bits >= 8:
        return np.ascontiguousarray(padded.astype(f"u{bits // 8}")).view(np.uint8).ravel()
    per = 8 // bits
    pieces = padded.reshape(-1, per) << (np.arange(per, dtype=np.uint64) * np.uint64(bits))
    return pieces.sum(1).astype(np.uint8)


def wmma(
    shape: str,
    types: tuple[str, ...],
    matrices_: list[np.ndarray],
    rows: list[bool],
    space: str,
    strides: list[int],
    text_of_types: str,
    **options: int | str,
) -> np.ndarray:
    """Loads A, B and C, multiplies, stores D; returns the memory of D in its layout."""
    d, a, c = types
    kinds = [a, a, c, d]
    data = [
        to_memory(encode(x, t), t, r, s)
        for x, t, r, s in zip(matrices_, kinds[:3], rows[:3], strides[:3], strict=True)
    ]
    m, n, _ = sizes(shape)
    lines = m if rows[3] else n
    data.append(np.zeros(lines * strides[3] * BITS[d] // 8, np.uint8))
    word = {True: "row", False: "col"}
    base = {t: "%d" if t == "f64" else "%r" for t in BITS}
    lists, first = [], 20
    for operand, t in zip("abcc", kinds, strict=True):
        count = wmma_registers(shape, operand, t)
        lists.append("{" + ", ".join(f"{base[t]}{first + i}" for i in range(count)) + "}")
        first += count
    where = [f"[%d{i}]" for i in range(4)]
    prologue = "".join(f"ld.param.u64 %d{i}, [p{i}];\n" for i in range(4))
    if space == ".shared":  # A is copied to shared memory first
        prologue += f"""
mov.u32 %r0, %tid.x; mov.u32 %r1, tile; cvt.u64.u32 %d5, %r0; add.u64 %d5, %d5, %d0;
add.u32 %r2, %r1, %r0; mov.u32 %r3, 0;
again: ld.global.u8 %r4, [%d5]; st.shared.u8 [%r2], %r4;
add.u64 %d5, %d5, 32; add.u32 %r2, %r2, 32; add.u32 %r3, %r3, 32;
setp.lt.u32 %p0, %r3, {len(data[0])}; @%p0 bra again;
bar.sync 0;
"""
        where[0] = "[tile]"
    bits = "xor.popc." if a == "b1" else ""
    spaces = [space, "", ".global", ".global"]
    body = "".join(
        f"wmma.load.{o}.sync.aligned.{word[r]}.{shape}{sp}.{t} {names}, {w}, {s};\n"
        for o, r, sp, t, names, w, s in zip(
            "abc", rows, spaces, kinds, lists, where, strides, strict=False
        )
    )
    machine_text = f""".visible .entry k({", ".join(f".param .u64 p{i}" for i in range(4))}) {{
.reg .b32 %r<80>; .reg .b64 %d<80>; .reg .pred %p<2>; .shared .align 128 .b8 tile[2048];
{prologue}{body}wmma.mma.{bits}sync.aligned.{word[rows[0]]}.{word[rows[1]]}.{shape}.{text_of_types}
 {lists[3]}, {lists[0]}, {lists[1]}, {lists[2]};
wmma.store.d.sync.aligned.{word[rows[3]]}.{shape}.global.{d} {where[3]}, {lists[3]}, {strides[3]};
ret; }}"""
    with machine.options(check=1, **options):
        machine.run(machine_text, "k", *data)
    if BITS[d] == 64:
        values = data[3].view(np.uint64)
    else:
        values = data[3].view(np.uint16 if d == "f16" else np.uint32)
    length = n if rows[3] else m
    result = decode(values, d).reshape(lines, strides[3])[:, :length]
    return result if rows[3] else result.T


@pytest.mark.parametrize(("shape", "d", "a", "c"), WMMA)
def test_wmma(shape: str, d: str, a: str, c: str) -> None:
    m, n, k = sizes(shape)
    x, y, old = matrices(m, n, k, a, a)
    whole = a in ("s4", "u4", "b1")  # A row-major, B column-major
    layouts = [(True, False, True, True)] if whole else [(True, True, False, True)]
    layouts += [] if whole else [(False, False, True, False)]
    types = f"{d}.{c}" if a == "f16" else f"{d}.{a}.{a}.{c}"
    products = (x[:, :, None] ^ y[None]).sum(1) if a == "b1" else x @ y
    for rows, space in zip(layouts, ("", ".shared"), strict=False):
        extents = [(m, k), (k, n), (m, n), (m, n)]
        pads = [128 if a == "b1" else 32 if whole else 8, 128 if a == "b1" else 16, 4, 8]
        strides = [e[1 if r else 0] + p for e, r, p in zip(extents, rows, pads, strict=True)]
        got = wmma(shape, (d, a, c), [x, y, old], list(rows), space, strides, types)
        assert np.array_equal(got, products + old)


def test_wmma_keeps_to_memory_and_values() -> None:
    """Bounds, and in check mode definedness: an undefined row of A makes a row of D undefined."""
    lists = ["{" + ", ".join(f"%r{b + i}" for i in range(8)) + "}" for b in (10, 20, 30)]
    text = f""".visible .entry k(.param .u64 a, .param .u64 out) {{
.reg .b32 %r<40>; .reg .b64 %d<4>; .shared .align 128 .b8 tile[512];
ld.param.u64 %d0, [a]; ld.param.u64 %d1, [out];
wmma.load.b.sync.aligned.row.m16n16k16.global.f16 {lists[1]}, [%d0], 16;
{{}}
wmma.load.c.sync.aligned.row.m16n16k16.global.f32 {lists[2]}, [%d1];
wmma.mma.sync.aligned.row.row.m16n16k16.f32.f32 {lists[2]}, {lists[0]}, {lists[1]}, {lists[2]};
wmma.store.d.sync.aligned.row.m16n16k16.global.f32 [%d1], {lists[2]}, 16; ret; }}"""
    load = f"wmma.load.a.sync.aligned.row.m16n16k16.global.f16 {lists[0]}, [%d0], 16;"
    a, out = np.ones((16, 16), np.float16), np.zeros((16, 16), np.float32)
    machine.run(text.replace("{}", load), "k", a, out)
    assert (out == 16).all()
    beyond = text.replace("{}", load.replace("[%d0]", "[%d0+32]"))
    with pytest.raises(MachineError, match=r"wmma\.load\.a.*past its end"):
        machine.run(beyond, "k", a, out)
    unset = text.replace("{}", load.replace("global", "shared").replace("[%d0]", "[tile]"))
    with (
        machine.options(check=1),
        pytest.raises(MachineError, match=r"wmma\.store\.d.*has none since line 5: wmma\.load"),
    ):
        machine.run(unset, "k", a, out)
    with pytest.raises(MachineError, match="without all 32 lanes of the warp"):
        machine.run(unset, "k", a, out, block=16)
