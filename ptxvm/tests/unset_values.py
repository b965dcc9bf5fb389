"""Uses of undefined values, and their correct twins, for the kernel of test_checks.py."""

from __future__ import annotations

STORE = "st.shared.b32 [%r2], %r0;\n"
SINK = "@%p2 st.global.b32 [%d0], %r5;\n"

MMA = (
    "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%f0,%f1,%f2,%f3}, {%r10,%r11}, {%r12}, "
    "{%f4,%f5,%f6,%f7};\n"
)
OPERANDS = {
    "%r10": "mov.b32 %r10, 0;\n",
    "%r11": "mov.b32 %r11, 0;\n",
    "%r12": "mov.b32 %r12, 0;\n",
    **{f"%f{i}": f"mov.b32 %f{i}, 0f00000000;\n" for i in range(4, 8)},
}


def multiply(missing: str, but_lane: int, result: str, in_lane: int) -> str:
    """An operand is undefined in one lane; one lane stores a result."""
    text = "".join(set_up for name, set_up in OPERANDS.items() if name != missing)
    text += f"and.b32 %r9, %r0, 31;\nsetp.ne.u32 %p3, %r9, {but_lane};\n@%p3 {OPERANDS[missing]}"
    return text + MMA + f"setp.eq.u32 %p4, %r9, {in_lane};\n@%p4 st.global.b32 [%d0], {result};\n"


SHUFFLE = (
    "and.b32 %r9, %r0, 31;\nsetp.ne.u32 %p3, %r9, 7;\n@%p3 mov.b32 %r6, 1;\n"
    "shfl.sync.bfly.b32 %r5, %r6, 2, 31, -1;\nsetp.eq.u32 %p4, %r9, {lane};\n"
    "@%p4 st.global.b32 [%d0], %r5;\n"
)
# Row 3 of the matrix is undefined.
MATRIX = (
    "".join(
        f"@%p2 st.shared.v4.b32 [%r3+{16 * i}], {{{{%r0, %r0, %r0, %r0}}}};\n"
        for i in range(8)
        if i != 3
    )
    + "@!%p0 bra DONE;\nand.b32 %r9, %r0, 7;\nmad.lo.u32 %r4, %r9, 16, %r3;\n"
    "ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r5}}, [%r4];\n"
    "setp.eq.u32 %p4, %r0, {lane};\n@%p4 st.global.b32 [%d0], %r5;\nDONE:\n"
)

THREE_OF_FOUR = (
    "mad.lo.u32 %r4, %r0, 16, %r3;\nst.shared.v2.b32 [%r4], {%r0, %r0};\n"
    "st.shared.b32 [%r4+12], %r0;\nld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r4];\n"
)
PICK = "mov.b32 %r5, 0;\n@%p6 mov.b32 %r5, 5;\n" + SINK

# Stored results, control flow and addresses must be defined; other computed values need not be.
UNINITIALISED = {
    "shared memory": (
        "ld.shared.b32 %r5, [%r2];\n" + SINK,
        "ld.shared.b32 %r5, [%r2];\nadd.u32 %r6, %r5, 1;\n",
        r"depends on an uninitialised value: source 2, which has none since line \d+: ld.shared",
    ),
    "part of a shared access": (
        "@%p2 st.shared.b32 [%r2], %r0;\n@%p2 ld.shared.v2.b32 {%r4, %r5}, [%r2];\n" + SINK,
        "@%p2 st.shared.v2.b32 [%r2], {%r0, %r0};\n@%p2 ld.shared.v2.b32 {%r4, %r5}, [%r2];\n"
        + SINK,
        r"uninitialised value: source 2, which has none since line \d+: ld.shared.v2.b32",
    ),
    "an unset element on its way through shared memory": (
        "@%p2 st.shared.v2.b32 [%r2], {%r0, %r7};\n@%p2 ld.shared.b32 %r5, [%r2+4];\n" + SINK,
        "@%p2 st.shared.v2.b32 [%r2], {%r0, %r7};\n@%p2 ld.shared.b32 %r5, [%r2];\n" + SINK,
        r"uninitialised value: source 2",
    ),
    "shared atomics": (
        "red.shared.add.u32 [%r2], %r0;\n",
        STORE + "red.shared.add.u32 [%r2], %r0;\n",
        r"read of uninitialised shared address 0x\w+",
    ),
    "local memory": (
        "mov.u64 %d1, mine;\nst.local.b32 [%d1], %r0;\nld.local.b32 %r5, [%d1+4];\n" + SINK,
        "mov.u64 %d1, mine;\nst.local.b32 [%d1+4], %r0;\nld.local.b32 %r5, [%d1+4];\n" + SINK,
        r"uninitialised value: source 2, which has none since line \d+: ld.local.b32",
    ),
    "part of a local access": (
        "mov.u64 %d1, mine;\nst.local.b32 [%d1+4], %r0;\nld.local.b64 %d2, [%d1];\n"
        "@%p2 st.global.b64 [%d0], %d2;\n",
        "mov.u64 %d1, mine;\nst.local.v2.b32 [%d1], {%r0, %r0};\nld.local.b64 %d2, [%d1];\n"
        "@%p2 st.global.b64 [%d0], %d2;\n",
        r"uninitialised value: source 2, which has none since line \d+: ld.local.b64",
    ),
    "an element of a local vector": (
        "mov.u64 %d1, mine;\nst.local.b32 [%d1], %r0;\nld.local.v2.b32 {%r4, %r5}, [%d1];\n" + SINK,
        "mov.u64 %d1, mine;\nst.local.b32 [%d1], %r0;\nld.local.v2.b32 {%r5, %r4}, [%d1];\n" + SINK,
        r"uninitialised value: source 2, which has none since line \d+: ld.local.v2.b32",
    ),
    "an element of a shared vector": (
        THREE_OF_FOUR + "add.u32 %r5, %r6, %r8;\n" + SINK,
        THREE_OF_FOUR + "add.u32 %r5, %r6, %r9;\n" + SINK,
        r"uninitialised value: source 2, which has none since line \d+: ld.shared.v4.u32",
    ),
    "an unset value on its way through local memory": (
        "mov.u64 %d1, mine;\nst.local.b32 [%d1], %r7;\nld.local.b32 %r5, [%d1];\n" + SINK,
        "mov.u64 %d1, mine;\nst.local.b32 [%d1], %r7;\nst.local.b32 [%d1], %r0;\n"
        "ld.local.b32 %r5, [%d1];\n" + SINK,
        r"uninitialised value: source 2",
    ),
    "a register": (
        "@%p2 st.global.b32 [%d0], %r6;\n",
        "mov.b32 %r6, 0;\n@%p2 st.global.b32 [%d0], %r6;\n",
        r"st.global.b32 .*: depends on an uninitialised register: source 2 .*thread 0,",
    ),
    "a value computed from one": (
        "mul.lo.u32 %r5, %r6, 3;\nadd.u32 %r5, %r5, 1;\n" + SINK,
        "mul.lo.u32 %r5, %r6, 3;\nselp.b32 %r5, %r0, %r5, %p2;\n" + SINK,
        r"source 2, which has none since line \d+: mul.lo.u32 \(block",
    ),
    "a value that is selected": (
        "selp.b32 %r5, %r7, %r0, %p2;\n" + SINK,
        "selp.b32 %r5, %r0, %r7, %p2;\n" + SINK,
        r"source 2, which has none since line \d+: selp.b32",
    ),
    "a register in some lanes": (
        "@%p2 mov.b32 %r6, 0;\n@%p0 st.global.b32 [%d0], %r6;\n",
        "@%p2 mov.b32 %r6, 0;\n@%p2 st.global.b32 [%d0], %r6;\n",
        r"uninitialised register: source 2 .*thread 1,",
    ),
    "a guard": (
        "@%p5 mov.b32 %r6, 0;\n@!%p5 mov.b32 %r6, 0;\n",
        "setp.eq.u32 %p5, %r0, %r0;\n@%p5 mov.b32 %r6, 0;\n",
        r"uninitialised register: the guard",
    ),
    "a branch on a comparison": (
        "setp.eq.u32 %p5, %r7, 0;\n@%p5 bra DONE;\n@!%p5 bra DONE;\nDONE:\n",
        "setp.eq.u32 %p5, %r7, 0;\nsetp.ne.u32 %p6, %r0, %r0;\nand.pred %p5, %p5, %p6;\n"
        "@%p5 bra DONE;\nDONE:\n",
        r"bra DONE: depends on an uninitialised value: the guard, .* setp.eq.u32",
    ),
    "a comparison joined with what is false": (
        "setp.ge.s32 %p5, %r0, 0;\nsetp.eq.and.s32 %p6, %r7, 1, %p5;\n" + PICK,
        "setp.lt.s32 %p5, %r0, 0;\nsetp.eq.and.s32 %p6, %r7, 1, %p5;\n" + PICK,
        r"the guard, which has none since line \d+: setp.eq.and.s32",
    ),
    "a comparison joined with the opposite": (
        "setp.ge.s32 %p5, %r0, 0;\nsetp.eq.or.s32 %p6, %r7, 1, !%p5;\n" + PICK,
        "setp.lt.s32 %p5, %r0, 0;\nsetp.eq.or.s32 %p6, %r7, 1, !%p5;\n" + PICK,
        r"the guard, which has none since line \d+: setp.eq.or.s32",
    ),
    "a comparison that decides alone": (
        "setp.eq.and.s32 %p6, %r0, %r0, %p5;\n" + PICK,
        "setp.ne.and.s32 %p6, %r0, %r0, %p5;\n" + PICK,
        r"the guard, which has none since line \d+: setp.eq.and.s32",
    ),
    "a comparison joined by xor": (
        "setp.eq.xor.s32 %p6, %r0, %r0, %p5;\n" + PICK,
        "xor.pred %p6, %p5, %p5;\n" + PICK,
        r"the guard, which has none since line \d+: setp.eq.xor.s32",
    ),
    "bits that are masked": (
        "and.b32 %r5, %r7, 1;\n" + SINK,
        "and.b32 %r5, %r7, 0;\nor.b32 %r6, %r7, -1;\nadd.u32 %r5, %r5, %r6;\n" + SINK,
        r"source 2, which has none since line \d+: and.b32",
    ),
    "a table that leaves a source out": (
        "lop3.b32 %r5, %r7, 3, 3, 0x80;\n" + SINK,
        "lop3.b32 %r5, %r7, 3, 3, 0xcc;\n" + SINK,
        r"source 2, which has none since line \d+: lop3.b32",
    ),
    "a selection between two alike": (
        "selp.b32 %r5, 1, 2, %p5;\n" + SINK,
        "selp.b32 %r5, 2, 2, %p5;\n" + SINK,
        r"source 2, which has none since line \d+: selp.b32",
    ),
    "an address": (
        "ld.shared.b32 %r5, [%r7];\n",
        STORE + "ld.shared.b32 %r5, [%r2];\n",
        r"ld.shared.b32 .*: depends on an uninitialised register: source 1",
    ),
    "the address of a store": (
        "st.shared.b32 [%r7], %r0;\n",
        "st.shared.b32 [%r2], %r7;\n",
        r"st.shared.b32 .*: depends on an uninitialised register: source 1",
    ),
    "a generic store": (
        "@%p2 st.b32 [%d0], %r7;\n",
        "mov.u64 %d1, tile;\ncvta.shared.u64 %d2, %d1;\n@%p2 st.b32 [%d2], %r7;\n",
        r"uninitialised register: source 2",
    ),
    "what an atomic adds": (
        STORE + "red.shared.add.u32 [%r2], %r7;\n",
        STORE + "red.shared.add.u32 [%r2], %r0;\n",
        r"red.shared.add.u32 .*uninitialised register: source 2",
    ),
    "the number of a barrier": (
        "bar.sync %r7;\n",
        "mov.b32 %r7, 1;\nbar.sync %r7;\n",
        r"bar.sync %r7: depends on an uninitialised register: source 1",
    ),
    "the size of a copy": (
        "cp.async.ca.shared.global [%r2], [%d0], 4, %r7;\n",
        "cp.async.ca.shared.global [%r2], [%d0], 4, 0;\n",
        r"uninitialised register: source 3",
    ),
    "a vote": (
        "setp.eq.u32 %p5, %r7, 0;\nvote.sync.any.pred %p6, %p5, -1;\n",
        "setp.eq.u32 %p5, %r0, 0;\nvote.sync.any.pred %p6, %p5, -1;\n",
        r"uninitialised value: source 1",
    ),
    "shuffled to another lane": (
        SHUFFLE.format(lane=5),
        SHUFFLE.format(lane=7),
        r"uninitialised value: source 2, .* shfl.sync.bfly.b32 .*lane 5\)",
    ),
    "accumulators": (
        multiply("%f6", 9, "%f2", 9),
        multiply("%f6", 9, "%f1", 9) + "@%p2 st.global.b32 [%d0], %f2;\n",
        r"uninitialised value: source 2, .* mma",
    ),
    "a row of A": (
        multiply("%r10", 9, "%f1", 11),
        multiply("%r10", 9, "%f2", 11),
        r"uninitialised value: source 2, .* mma",
    ),
    "another row of A": (
        multiply("%r11", 9, "%f3", 8),
        multiply("%r11", 9, "%f3", 12),
        r"uninitialised value: source 2, .* mma",
    ),
    "a column of B": (
        multiply("%r12", 21, "%f3", 30),
        multiply("%r12", 21, "%f2", 30),
        r"uninitialised value: source 2, .* mma",
    ),
    "another column of B": (
        multiply("%r12", 21, "%f1", 2),
        multiply("%r12", 21, "%f1", 3),
        r"uninitialised value: source 2, .* mma",
    ),
    "a row of ldmatrix": (
        MATRIX.format(lane=13, trans=""),
        MATRIX.format(lane=16, trans=""),
        r"uninitialised value: source 2, which has none since line \d+: ldmatrix",
    ),
    "a row of ldmatrix, transposed": (
        MATRIX.format(lane=29, trans=".trans"),
        MATRIX.format(lane=30, trans=".trans"),
        r"uninitialised value: source 2, which has none since line \d+: ldmatrix",
    ),
}
