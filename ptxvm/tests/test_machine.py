"""Modules, parameters, variables, special registers, launch rules, and errors in the PTX."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ints import run_ints
from machine import MachineError, machine


def store(body: str, declarations: str = "", *, count: int = 32, **launch: Any) -> list[int]:
    """Runs a body that stores to [%out], the thread's element of an int32 array."""
    text = f"""{declarations}
.visible .entry k(.param .u64 p_out) {{
 .reg .pred %p<5>; .reg .b16 %h<5>; .reg .b32 %r<20>; .reg .b64 %rd<10>, %out;
 ld.param.u64 %out, [p_out]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
 mad.lo.u32 %r0, %r1, %r2, %r0; mul.wide.u32 %rd0, %r0, 4; add.u64 %out, %out, %rd0;
{body}
 ret; }}"""
    out = np.full(count, -1, np.int32)
    machine.run(text, "k", out, **launch)
    return out.tolist()


@pytest.mark.parametrize(
    ("text", "report"),
    [
        (" frobnicate.u32 %r1, %r2;", r"k, line 12: frobnicate\.u32 %r1, %r2: unknown opcode"),
        (" add.s33 %r1, %r2, %r3;", r"k, line 12: add\.s33 %r1, %r2, %r3: "),
        (" add.wide.u32 %r1, %r2, %r3;", r"k, line 12: add\.wide\.u32 %r1, %r2, %r3: "),
        (" add.u32 %r1, %r2, %q9;", r"line 12: add\.u32 %r1, %r2, %q9: unknown operand '%q9'"),
        (" add.u32 %r1, %rd2, 3;", "operand %rd2 has 64 bits where the instruction has 32"),
        (" add.u32 5, %r2, 3;", "destination '5' is no register"),
        (" ld.global.u32 %r1, [%q];", r"unknown address '\[%q\]'"),
        (" ld.global.u32 %r1, %rd1;", "'%rd1' is no address"),
        (" bra NOWHERE;", r"line 12: bra NOWHERE: unknown label NOWHERE"),
        (" brx.idx %r1, NOWHERE;", "unknown table of branch targets NOWHERE"),
        (" bra.fast HERE; HERE:", r"unknown modifier \.fast"),
        (" @%r1 bra HERE; HERE:", "guard %r1 is no predicate"),
        (" .frob .b32 %x;", r"k, line 12: \.frob \.b32 %x: unknown directive"),
        (" .reg .c32 %x;", r"unknown register type \.c32"),
        (" HERE: HERE:", "a second label HERE"),
        (" add.u32 %r1, %r2, %r3", "no ';' follows"),
        (" {", "line 3: {: the braces that open here are not closed"),
        (" bar.red.popc.u32 %r1, 0;", "expected 3 or 4 operands"),
        (" barrier.cta 0;", "one of .sync and .arrive is needed"),
        (" @ mov.u32 %r1, %r2;", "a guard without a register"),
        (" mov.b32 {}, %r1;", "0 elements of type .b32 are not supported here"),
        (" .reg .b32 %x<-1>;", "the number of registers must be at most 1048576; got '%x<-1>'"),
        (
            " .local .b8 a[300000]; .local .b8 b[300000]; mov.u64 %rd1, a; mov.u64 %rd1, b;",
            "b and those before it must have at most 524288 bytes; got 600000",
        ),
    ],
)
def test_bad_statements_are_named(text: str, report: str) -> None:
    with pytest.raises(MachineError, match=report) as error:
        run_ints("\n // a comment; it counts as a line\n" + text, np.zeros(32))
    assert error.value.code == 218  # cudaErrorInvalidPtx


@pytest.mark.parametrize(
    ("text", "report"),
    [
        (".frob .b32 x;", r"PTX, line 2: \.frob \.b32 x: unknown directive"),
        (".global .b32 x; .global .b32 x;", "a second declaration of x"),
        (".global .b32 x[2] = {1, 2, 3};", "more initial values than x has elements"),
        (".global .b64 x = nowhere;", "'nowhere' is neither a number, a variable"),
        (".entry e(.param .c32 a) { ret; }", r"e, line 2: .*unknown type or directive \.c32"),
        (".entry e() .frob 3 { ret; }", "unknown attribute of a function"),
        (".entry e() { ret; } .entry e() { ret; }", "a second definition of e"),
        (".entry e() .maxntid 65536, 65536 { ret; }", "the number of threads must have 32 bits"),
        (".entry () { ret; }", "a function without a name"),
        (".entry e(.param .b32 3) { ret; }", "a parameter without name or type"),
        (".entry e(.param .b8 a[32760], .param .u64 b) { ret; }", "at most 32764 bytes; got 32768"),
        *(
            (
                f".entry e(.param .{kind} p{extent}) {{ ret; }}",
                rf"e, line 2: .*parameter p: the number of elements must be from 1 to {maximum}; "
                rf"got '{re.escape(extent)}'",
            )
            for kind, extent, maximum in (
                *(
                    ("b8", x, 32764)
                    for x in ("[]", "[0]", "[-1]", "[4", "[32765]", "[0x4]", "[4]]")
                ),
                ("u64", "[536870913]", 4095),
                ("u64", "[99999999999999999999]", 4095),
            )
        ),
        *(
            (text.replace("N", number), f"a power of two, at most 65536; got '{number.strip('-')}'")
            for text in (".entry e(.param .align N .b8 p[4]) { ret; }", ".global .align N .b8 x;")
            for number in ("0", "3", "x", "131072", "0f00000001")
        ),
        (".global .b8 x[-1];", r"x must have extents in brackets, .*; got '\[-1\]'"),
        (".global .b8 x[4;", r"x must have extents in brackets, .*; got '\[4'"),
        (".global .b64 x[1099511627776][16777216];", "at most 137438953472 elements"),
        (".shared .b8 x[16777217];", "at most 16777216 elements"),
        (".global .f32 x = 0f-1234567;", "'0f-1234567' is neither a number"),
        (".global .b64 x = 18446744073709551616;", "is neither a number"),
    ],
)
def test_bad_declarations_are_named(text: str, report: str) -> None:
    with pytest.raises(MachineError, match=report):
        machine.load("\n" + text)


def test_text_of_comments_and_debug_lines() -> None:
    body = """ /* a block; { of
 comment */ .reg .b32 %x;
\t.loc\t1 5 3, function_name $L__info_string0, inlined_at 1 7 2
\tmov.u32 \t%x,\t0x1F; // st.global.u32 [%out], 1;
 st.global.u32\t[ %out + 0 ], %x ;
 .pragma "nounroll;";"""
    section = '.file\t1 "a//b.cu"\n.section .debug_str\n{\n$L__info_string0:\n.b8 95\n}\n'
    assert store(body, section) == [31] * 32


def test_scopes_repeat_names() -> None:
    body = """
 mov.u32 %r3, 0;
 { .reg .b32 %x; .reg .pred %q; mov.u32 %x, 5; setp.eq.u32 %q, %x, 5; @!%q bra DONE;
   add.u32 %r3, %r3, %x;
   { .reg .b64 %x; mov.u64 %x, 7; cvt.u32.u64 %r4, %x; add.u32 %r3, %r3, %r4; }
   add.u32 %r3, %r3, %x;
   DONE: }
 { .reg .b32 %x; mov.u32 %x, 100; bra DONE; add.u32 %x, %x, 1; DONE: add.u32 %r3, %r3, %x; }
 st.global.u32 [%out], %r3;"""
    assert store(body) == [117] * 32


def test_directives_need_no_blanks() -> None:
    body = """
 mov.u32 %r4, 0x20005;
 {.reg.b16 hl, hu; mov.b32 {hl, hu}, %r4; cvt.u32.u16 %r3, hl; cvt.u32.u16 %r4, hu;}
 add.u32 %r3, %r3, %r4; ld.global.u32 %r4, [word]; add.u32 %r3, %r3, %r4;
 st.global.u32 [%out], %r3;"""
    assert store(body, ".visible.global.align 4.b32 word = 100;\n") == [107] * 32


def test_pointers_to_functions() -> None:
    """Such a pointer has a value; a call through it is an error for the lanes that reach it."""
    declarations = """
.func (.param .b32 result) second(.param .b32 value);
.global .align 8 .u64 table[3] = {first, generic(second), first};
.func (.param .b32 result) first(.param .b32 value) { st.param.b32 [result], 1; ret; }
.func (.param .b32 result) second(.param .b32 value) { st.param.b32 [result], 2; ret; }
"""
    body = """
 ld.global.u64 %rd1, [table]; ld.global.u64 %rd2, [table+8]; ld.global.u64 %rd3, [table+16];
 mov.u64 %rd4, second;
 setp.eq.u64 %p1, %rd1, %rd3; setp.ne.and.u64 %p1, %rd1, 0, %p1;
 setp.eq.and.u64 %p1, %rd2, %rd4, %p1; setp.ne.and.u64 %p1, %rd1, %rd2, %p1;
 selp.u32 %r3, 1, 0, %p1; st.global.u32 [%out], %r3;
 mov.u32 %r4, %tid.x; setp.ne.u32 %p2, %r4, WHO; @%p2 bra DONE;
 { .param .b32 v; st.param.b32 [v], %r4; .param .b32 r;
   form: .callprototype (.param .b32 _) _ (.param .b32 _);
   call (r), %rd1, (v), form; ld.param.b32 %r3, [r]; }
 DONE:"""
    assert store(body.replace("WHO", "99"), declarations) == [1] * 32
    with pytest.raises(MachineError, match=r"line \d+: call .*%rd1.*through pointers.*thread 7,"):
        store(body.replace("WHO", "7"), declarations)


def test_literals() -> None:
    cases = {
        "10": 10,
        "-3": -3,
        "0x7f": 127,
        "017": 15,
        "0b101": 5,
        "7U": 7,
        "0f3F800000": 0x3F800000,
        "WARP_SZ": 32,
    }
    for text, value in cases.items():
        assert store(f" mov.b32 %r3, {text}; st.global.u32 [%out], %r3;")[0] == value
    assert (
        store(
            " mov.b64 %rd1, 0d3FF0000000000000; shr.u64 %rd1, %rd1, 32;"
            " cvt.u32.u64 %r3, %rd1; st.global.u32 [%out], %r3;"
        )[0]
        == 0x3FF00000
    )
    assert store(" mov.f32 %r3, 1.5; st.global.u32 [%out], %r3;")[0] == 0x3FC00000


def test_variables_of_a_module() -> None:
    declarations = """
.visible .global .align 8 .b64 pointer = words+4;
.const .align 4 .f32 reals[2] = {1.0, 0fBF800000};
.global .align 2 .u16 halves[2][2] = {{1, 2}, {3, 65535}};
.global .align 8 .u64 generic_pointer = generic(words)+8;
.global .align 8 .b8 bytes[8] = {0xFF(words), 0xFF00(words), 0xFF0000(words),
  0xFF000000(words), 0xFF00000000(words), 0xFF0000000000(words), 0xFF000000000000(words), 0};
.global .align 4 .u32 words[4] = {10, 20, 30};
"""
    loads = {
        "ld.global.u64 %rd1, [pointer]; ld.global.u32 %r3, [%rd1];": 20,
        "ld.global.u64 %rd1, [generic_pointer]; ld.u32 %r3, [%rd1];": 30,
        "ld.global.u64 %rd1, [bytes]; ld.global.u32 %r3, [%rd1];": 10,
        "ld.const.u32 %r3, [reals];": 0x3F800000,
        "mov.u64 %rd1, reals; ld.const.u32 %r3, [%rd1+4];": 0xBF800000 - 2**32,
        "mov.u64 %rd1, halves+4; ld.global.u16 %r3, [%rd1+2];": 65535,
        "ld.global.u32 %r3, [words+12];": 0,
        "atom.global.add.u32 %r3, [words], 0;": 10,
    }
    for load, value in loads.items():
        assert store(f" {load} st.global.u32 [%out], %r3;", declarations)[0] == value


def test_dynamic_shared_memory_comes_after_static() -> None:
    declarations = """
.shared .align 4 .b8 unused[4096];
.shared .align 4 .b8 first[12];
.extern .shared .align 128 .b8 dynamic[];
"""
    body = """
 .shared .align 2 .b8 second[6];
 mov.u32 %r3, first; mov.u32 %r4, second; mov.u32 %r5, dynamic; mov.u32 %r6, dynamic+8;
 mov.u64 %rd1, dynamic; cvt.u32.u64 %r8, %rd1; mov.u32 %r7, %dynamic_smem_size;
 sub.u32 %r6, %r6, %r5; sub.u32 %r8, %r8, %r5;
 mad.lo.u32 %r3, %r3, 1000, %r4; mad.lo.u32 %r3, %r3, 1000, %r5; mad.lo.u32 %r3, %r3, 10, %r6;
 mad.lo.u32 %r3, %r3, 1000, %r7; add.u32 %r3, %r3, %r8;
 st.shared.u32 [%r5+252], %r3;
 st.global.u32 [%out], %r3;"""
    assert store(body, declarations, shared=256)[0] == 12 * 10**7 + 128 * 10**4 + 8 * 1000 + 256
    with pytest.raises(MachineError, match=r"st\.shared\.u32 .*shared"):
        store(body, declarations, shared=252)


def test_local_memory_is_per_lane() -> None:
    body = """
 .local .align 8 .b8 stack[16]; .local .align 4 .b8 other[4];
 mov.u64 %rd1, stack; cvta.local.u64 %rd2, %rd1;
 st.local.u32 [other], 1000;
 st.u32 [%rd2+12], %r0;
 ld.local.u32 %r3, [stack+12]; ld.local.u32 %r4, [other];
 add.u32 %r3, %r3, %r4;
 st.global.u32 [%out], %r3;"""
    assert store(body, count=96, block=96) == [1000 + i for i in range(96)]


def test_parameters_lie_by_their_alignment() -> None:
    text = """
.visible .entry k(
 .param .u8 a, .param .align 8 .b8 b[12], .param .u16 c, .param .u64 .ptr .global .align 1 out,
 .param .f32 d[2], .param .align 4 .b8 e[4])
{
 .reg .b32 %r<10>; .reg .b64 %rd<4>;
 ld.param.u64 %rd1, [out];
 ld.param.u8 %r1, [a]; ld.param.u32 %r2, [b+8]; ld.param.u16 %r3, [c];
 ld.param.b32 %r4, [d+4]; ld.param.u8 %r5, [e+3];
 mov.b64 %rd2, b; cvta.param.u64 %rd3, %rd2; ld.u32 %r6, [%rd3+4];
 st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4}; st.global.v2.u32 [%rd1+16], {%r5, %r6};
 ret;
}"""
    out = np.zeros(6, np.int32)
    structure = np.array([1, 2, 3], np.int32)
    arguments = (
        np.uint8(200),
        np.void(structure.tobytes()),
        np.uint16(50000),
        out,
        np.void(np.array([1.0, 2.0], np.float32).tobytes()),
        np.void(b"abcd"),
    )
    machine.run(text, "k", *arguments, block=1)
    assert out.tolist() == [200, 3, 50000, 0x40000000, ord("d"), 2]


def test_special_registers() -> None:
    text = """
.visible .entry k(.param .u64 p_out) {
 .reg .b32 %r<60>; .reg .b64 %rd<5>;
 mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z;
 mov.u32 %r3, %ntid.x; mov.u32 %r4, %ntid.y; mov.u32 %r5, %ntid.z;
 mov.u32 %r6, %ctaid.x; mov.u32 %r7, %ctaid.y; mov.u32 %r8, %ctaid.z;
 mov.u32 %r9, %nctaid.x; mov.u32 %r10, %nctaid.y; mov.u32 %r11, %nctaid.z;
 mov.u32 %r12, %laneid; mov.u32 %r13, %warpid; mov.u32 %r14, %nwarpid;
 mov.u32 %r15, %lanemask_lt;
 mov.u32 %r16, %lanemask_eq; mov.u32 %r17, %lanemask_le; mov.u32 %r18, %lanemask_gt;
 mov.u32 %r19, %lanemask_ge;
 mad.lo.u32 %r20, %r8, %r10, %r7; mad.lo.u32 %r20, %r20, %r9, %r6;
 mad.lo.u32 %r21, %r2, %r4, %r1; mad.lo.u32 %r21, %r21, %r3, %r0;
 mul.lo.u32 %r22, %r3, %r4; mul.lo.u32 %r22, %r22, %r5;
 mad.lo.u32 %r23, %r20, %r22, %r21;
 ld.param.u64 %rd1, [p_out]; mad.wide.u32 %rd1, %r23, 80, %rd1;
"""
    for i in range(0, 20, 4):
        text += f" st.global.v4.u32 [%rd1+{4 * i}], {{%r{i}, %r{i + 1}, %r{i + 2}, %r{i + 3}}};\n"
    grid, block = (3, 2, 2), (5, 4, 3)
    out = np.zeros((12, 60, 20), np.uint32)
    machine.run(text + " ret; }", "k", out, grid=grid, block=block)
    for b in range(12):
        for t in range(60):
            lane = t % 32
            low = (1 << lane) - 1
            expected = [t % 5, t // 5 % 4, t // 20, *block, b % 3, b // 3 % 2, b // 6, *grid]
            expected += [lane, t // 32, 2, low, low + 1, 2 * low + 1]
            expected += [0xFFFFFFFF ^ (2 * low + 1), 0xFFFFFFFF ^ low]
            assert out[b, t].tolist() == expected


def test_clocks_advance() -> None:
    body = """
 mov.u64 %rd1, %clock64;
WAIT: mov.u64 %rd2, %clock64; sub.u64 %rd3, %rd2, %rd1; setp.lt.u64 %p1, %rd3, 1000;
 @%p1 bra WAIT;
 st.global.u32 [%out], 1;"""
    with machine.options(fuel=100):
        assert store(body) == [1] * 32


LIMITS = """
.visible .entry bounded(.param .u64 p) .maxntid 64, 1, 1 { ret; }
.visible .entry exact(.param .u64 p) .reqntid 8, 4 { ret; }
.shared .align 4 .b8 block[40000];
.visible .entry shared(.param .u64 p) {
 .reg .b32 %r<2>; mov.u32 %r1, block; ret; }
"""


@pytest.mark.parametrize(
    ("kernel", "launch", "code", "report"),
    [
        ("bounded", {"block": 65}, 1, "bound to 64 threads per block; got 65"),
        ("bounded", {"block": (33, 32)}, 9, "at most 1024 threads; got 1056"),
        ("bounded", {"block": (1, 1, 65)}, 9, r"block \(1, 1, 65\) must be"),
        ("bounded", {"block": 0}, 9, r"block \(0, 1, 1\) must be"),
        ("bounded", {"grid": (1, 65536)}, 9, r"grid \(1, 65536, 1\) must be"),
        ("bounded", {"grid": 0}, 9, r"grid \(0, 1, 1\) must be"),
        ("exact", {"block": 32}, 1, r"requires blocks of \(8, 4, 1\); got \(32, 1, 1\)"),
        ("bounded", {"shared": 163 * 1024 + 1}, 1, "at most 166912 bytes.*; got 166913"),
        ("shared", {"shared": 163 * 1024}, 1, "at most 126912 bytes.*; got 166912"),
        ("missing", {}, 200, "the module has no such kernel"),
    ],
)
def test_rules_of_a_launch(kernel: str, launch: dict[str, Any], code: int, report: str) -> None:
    module = machine.load(LIMITS)
    with pytest.raises(MachineError, match=rf"^{kernel}: (.*){report}") as error:
        module.launch(kernel, np.zeros(1), **launch)
    assert error.value.code == code
    module.launch("bounded", np.zeros(1), block=64, shared=163 * 1024)
    module.launch("exact", np.zeros(1), block=(8, 4))
    module.launch("shared", np.zeros(1), shared=126912)


def test_options() -> None:
    for settings, report in {
        "speed": "'speed' is not of the form name=value",
        "speed=1": "unknown option speed",
        "check=2": "check: must be from 0 to 1; got 2",
        "order=random": "must be forward, reverse, seeded, weak or sleepy; got random",
        "fuel=0": "fuel: must be from 1",
        "on_fault=1": "on_fault: must be stop, report or collect; got 1",
        "device=sm_70": "device: must be sm_80, sm_86, sm_89, sm_90a or sm_120; got sm_70",
    }.items():
        assert machine.library.ptxvm_configure(settings.encode()) == -1
        assert report in machine.library.ptxvm_last_report().decode()
        assert machine.library.ptxvm_last_report() == b""


def test_options_are_told_as_they_are_set() -> None:
    """Nested options are restored to their previous values; all of them can be set at once."""
    before = machine.settings
    with machine.options(check=1, order="seeded", **{"async": "seed:7"}):
        with machine.options(check=0, on_fault="collect", device="sm_90a"):
            inner = machine.settings
        assert machine.settings["check"] == "1" and machine.settings["device"] == before["device"]
    told = {"check": "0", "order": "seeded", "async": "seed:7", "on_fault": "collect"}
    assert told | {"device": "sm_90a"} == {n: inner[n] for n in (*told, "device")}
    assert machine.settings == before
    machine.configure(**before)


def test_the_machine_includes_nothing_of_the_package() -> None:
    folder = Path(__file__).parents[1] / "src" / "ptxvm"
    if not folder.is_dir():
        pytest.skip("the sources are not beside the tests")
    included = {
        name
        for path in folder.iterdir()
        if path.suffix in (".cpp", ".h")
        for name in re.findall(r'#include "([^"]+)"', path.read_text())
    }
    assert included and all(name.startswith("ptxvm/") for name in included)


@pytest.mark.parametrize("folder", [".", ".."])
def test_the_package_is_not_hidden_by_the_folder_of_its_name(folder: str) -> None:
    """Python would take a folder `ptxvm` without __init__.py for a namespace package."""
    tree = Path(__file__).parents[1] / folder
    code = "import ptxvm; print(ptxvm.Machine.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.stdout == "ptxvm.vm\n", done.stderr


def test_launches_from_several_threads() -> None:
    """Launches are serialised; a fault belongs to the thread that launched."""
    text = """
.visible .entry k(.param .u64 p_out, .param .u32 value, .param .u32 fails) {
 .reg .pred %p1; .reg .b32 %r<9>; .reg .b64 %rd<3>;
 ld.param.u64 %rd1, [p_out]; ld.param.u32 %r1, [value]; ld.param.u32 %r2, [fails];
 mov.u32 %r3, %tid.x; mad.wide.u32 %rd2, %r3, 4, %rd1;
 mov.u32 %r4, 0;
LOOP: add.u32 %r5, %r5, %r1; add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 1000; @%p1 bra LOOP;
 setp.ne.u32 %p1, %r2, 0; setp.eq.and.u32 %p1, %r3, %r1, %p1; @%p1 trap;
 st.global.u32 [%rd2], %r1; ret; }"""
    module = machine.load(text)

    def work(number: int) -> list[str]:
        seen = []
        for i in range(20):
            out = np.zeros(64, np.int32)
            try:
                module.launch("k", out, np.uint32(number), np.uint32(i % 3 == number % 3), block=64)
                seen.append("ran" if (out == number).all() else "wrong")
            except MachineError as error:
                seen.append("failed" if f"thread {number}," in str(error) else str(error))
        return seen

    with ThreadPoolExecutor(4) as pool:
        for number, seen in enumerate(pool.map(work, range(1, 5)), 1):
            assert seen == ["failed" if i % 3 == number % 3 else "ran" for i in range(20)]
