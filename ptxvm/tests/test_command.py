"""ptxvm run, check and count: PTX text and programs."""

from __future__ import annotations

import doctest
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toolchain
import torch
from machine import LIBRARY
from ptxvm.__main__ import main

import ptxvm
from ptxvm import arguments, binary, kernel

# Thread i reads the word of thread 63 - i, in the other warp, with or without a barrier.
KERNEL = """
.visible .entry swap(.param .u64 x, .param .u64 .ptr .global .align 16 out, .param .f32 add) {
.reg .b64 %d<8>; .reg .b32 %r<8>; .reg .f32 %f<4>;
.shared .align 4 .b8 line[256];
ld.param.u64 %d0, [x]; ld.param.u64 %d1, [out]; ld.param.f32 %f2, [add];
mov.u32 %r0, %tid.x;
mul.wide.u32 %d2, %r0, 4;
add.u64 %d3, %d0, %d2;
add.u64 %d4, %d1, %d2;
ld.global.f32 %f0, [%d3];
mov.u32 %r1, line;
shl.b32 %r2, %r0, 2;
add.u32 %r3, %r1, %r2;
st.shared.f32 [%r3], %f0;
BARRIER
xor.b32 %r4, %r2, 252;
add.u32 %r5, %r1, %r4;
ld.shared.f32 %f1, [%r5];
add.f32 %f1, %f1, %f2;
st.global.f32 [%d4], %f1;
ret; }
"""
ARGUMENTS = ["--block", "64", "--arg", "const f32[64]=arange", "--arg", "f32[64]=nan", "--arg", "2"]
READ = 18  # line of ld.shared


@pytest.fixture
def right(tmp_path: Path) -> str:
    path = tmp_path / "right.ptx"
    path.write_text(KERNEL.replace("BARRIER", "bar.sync 0;"))
    return str(path)


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    path = tmp_path / "wrong.ptx"
    path.write_text(KERNEL.replace("BARRIER", ""))
    return str(path)


def test_run_prints_and_saves_what_the_kernel_wrote(right, tmp_path, capsys):
    saved = tmp_path / "out.npy"
    assert main(["run", right, *ARGUMENTS, "--save", f"1={saved}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("argument 1: 64 of 64 elements changed: 65 64 63 62 61 60 59 58 ...\n")
    assert np.array_equal(np.load(saved), 65 - np.arange(64, dtype=np.float32))
    described = tmp_path / "launch.json"
    described.write_text(json.dumps({"block": 64, "args": ["f32[64]=ones", f"f32[64]={saved}", 3]}))
    assert main(["run", right, "--launch", str(described), "--print", "1"]) == 0
    assert capsys.readouterr().out.startswith("argument 1, f32[64]:\n[4. 4. ")
    # A store to a const input is a fault.
    assert main(["run", right, *ARGUMENTS[:4], "--arg", "const f32[64]=0", "--arg", "1"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("fault: swap, line 20\n") and "read-only" in out
    assert "  >    20 | st.global.f32 [%d4], %f1;\n" in out


def test_check_names_a_race_once_with_its_line(right, wrong, capfd):
    assert main(["check", right, *ARGUMENTS]) == 0
    assert capfd.readouterr().out == f"{right}: 0 findings; 6 runs of 1 launch\n"
    assert main(["check", wrong, *ARGUMENTS]) == 1
    out, err = capfd.readouterr()
    assert not err
    (line,) = (x for x in out.splitlines() if x.startswith("race") and f"line {READ} " in x)
    assert line.endswith("swap, line 18 [all 6 modes]")
    assert f"  >    {READ} | ld.shared.f32 %f1, [%r5];\n" in out
    assert "hint: nvcc -lineinfo adds" in out


def test_check_as_json_and_modes(wrong, capfd):
    modes = ["--order", "reverse,seeded", "--async", "seed:4", "--set", "watchdog=20"]
    assert main(["check", wrong, *ARGUMENTS, *modes, "--fuel", "7", "--json"]) == 1
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert not err and document["status"] == 1 and document["options"]["fuel"] == 7
    shown = {(f["rule"].split()[0], f["line"]) for f in document["findings"]}
    assert ("race", READ) in shown
    assert [run["order"] for run in document["runs"]] == ["reverse", "seeded"]
    stop = ["--on-fault", "stop", "--order", "forward", "--async", "latest", "--json"]
    assert main(["check", wrong, *ARGUMENTS, *stop]) == 1
    (finding,) = json.loads(capfd.readouterr().out)["findings"]
    assert finding["rule"] in ("race with a write", "depends on an uninitialised value")
    assert finding["line"] in (READ, 20) and finding["lines"][0]["cause"]["line"] in (14, READ)


def test_check_compares_results(tmp_path, capfd):
    """A block that finds a counter at zero reveals the order of blocks."""
    path = tmp_path / "order.ptx"
    path.write_text(
        ".visible .entry first(.param .u64 c) { .reg .b64 %d0; .reg .b32 %r<3>; .reg .pred %p0;\n"
        "ld.param.u64 %d0, [c]; mov.u32 %r0, %ctaid.x;\n"
        "atom.global.cas.b32 %r1, [%d0], 0, 7;\nsetp.eq.u32 %p0, %r1, 0;\n"
        "@%p0 atom.global.add.u32 %r2, [%d0+4], %r0;\nret; }"
    )
    call = ["check", str(path), "--grid", "2", "--block", "1", "--arg", "u32[2]=0"]
    assert main([*call]) == 1
    out = capfd.readouterr().out
    assert "other result 0: first [reverse, latest; reverse, earliest; reverse, seed:1]" in out
    assert "1 of 2 elements of argument 0 are not those of [forward, latest]" in out
    assert main([*call, "--order", "forward"]) == 0


def test_count_is_a_table(right, capsys):
    assert main(["count", right, *ARGUMENTS]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["swap"] and ["barriers", "2"] in rows
    assert ["load", "2", "256", "2", "2"] in rows  # shared memory
    assert ["store", "2", "256", "8", "8"] in rows  # global memory
    assert main(["count", right, *ARGUMENTS, "--json"]) == 0
    (launch,) = json.loads(capsys.readouterr().out)["runs"][0]["launches"]
    assert launch["classes"]["memory"]["instructions"] == 8


BAD = [
    ([], "must be given once for each parameter of swap(.u64 x, .u64 out, .f32 add); got 0"),
    (["--kernel", "nosuch", "--arg", "1"], "--kernel: must name one kernel; got 'nosuch'"),
    (
        ["--set", "check=0", *ARGUMENTS],
        "--set: must be one of approximate, proxy, seed, resident_blocks, ",
    ),
    (["--set", "watchdog=x", *ARGUMENTS], "--set: watchdog: must be from 0 to 4294967295; got x"),
    (["--set", "seed=1,check=0", *ARGUMENTS], "--set: must be NAME=VALUE; got 'seed=1,check=0'"),
    (["--set", "speed", *ARGUMENTS], "--set: must be NAME=VALUE; got 'speed'"),
    (["--mma", "nosuch", *ARGUMENTS], "--mma: invalid choice: 'nosuch'"),
    (["--grid", "1,2,3,4"], "--grid: must be X, X,Y or X,Y,Z; got '1,2,3,4'"),
    (["--order", "up"], "--order: must be forward, reverse, seeded, weak or sleepy; got 'up'"),
    (["--async", "latest,earliest"], "--async: must be latest, earliest or seed:N; got 'latest,e"),
    (["--print", "2", *ARGUMENTS], "--print: must be the number of an array; got 2"),
    (["--save", "1=out.txt"], "--save: must be N=FILE.npy; got '1=out.txt'"),
    (["--save", "1=no/out.npy", *ARGUMENTS], "--save: must be writable; got 'no/out.npy' (No such"),
    (["--launch", "nosuch.json"], "--launch: must be a JSON file; got 'nosuch.json'"),
    (["--shared", "1000000", *ARGUMENTS], "swap: launch: dynamic shared memory is at most"),
    ([*ARGUMENTS, "--", "3"], "ARGS and --entry: are for programs"),
    ([*ARGUMENTS[:-1], "f32[2]=1"], "--arg: number 2 (.f32 add) must have 4 bytes; got 'f32[2]=1'"),
    ([*ARGUMENTS[:-1], "x"], "--arg: number 2 (.f32 add) must be zeros, ones, nan, arange, random"),
    ([*ARGUMENTS[:-1], "q8=1"], "type must be one of i8, s8, u8, b8, i16"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[m for _, m in BAD])
def test_a_command_that_cannot_run(words, message, right, capsys):
    assert main(["run", right, *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ptxvm run: ") and message in err and err.count("\n") == 1


def test_files_that_are_none(tmp_path, capsys, monkeypatch):
    plain = tmp_path / "plain.txt"
    plain.write_text("no kernel")
    orphan, foreign = tmp_path / "orphan", tmp_path / "foreign"
    orphan.write_text("#!/no/such/interpreter\n")
    image = bytearray(Path(sys.executable).resolve().read_bytes())
    image[18:20] = (183).to_bytes(2, "little")  # arm64
    foreign.write_bytes(image)
    for program in (orphan, foreign):
        program.chmod(0o755)
    unknown = tmp_path / "unknown.ptx"
    unknown.write_text(".entry k() {\nfrobnicate.u32 %r1;\nret; }")
    for status, words, message in (
        (2, ["nosuch"], "FILE: must be a program or PTX text; got 'nosuch'"),
        (2, [str(plain)], "FILE: must be a program or PTX text with an .entry; got '"),
        (2, [str(LIBRARY)], "--entry: must be given for a shared object: a function that takes "),
        (3, ["true"], "FILE: must launch a kernel on the machine; 'true' launched none"),
        (3, ["false", "--", "x"], "'false' launched none (exit status 1)"),
        (2, ["true", "--grid", "1"], "--grid: is for PTX text; FILE is a program"),
        (2, ["true", "--shared", "1"], "--shared: is for PTX text; FILE is a program"),
        (2, ["true", "--set", "nosuch=1"], "--set: must be one of approximate, proxy, seed, "),
        (2, ["x" * 300], "FILE: must be a program or PTX text; got 'xxx"),
        (3, [str(orphan)], "orphan' (No such file or directory)"),
        (2, [str(foreign)], "FILE: must be a program for x86-64; got '"),
        (3, [str(unknown)], "k, line 2: frobnicate.u32 %r1: unknown opcode"),
    ):
        assert main(["check", *words]) == status
        assert message in capsys.readouterr().err
    other = tmp_path / "libcudart.so.13"
    other.write_text("no library")
    for named in ("nosuch", str(tmp_path), str(plain), str(other)):
        monkeypatch.setenv("PTXVM_LIBRARY", named)
        assert main(["run", str(plain)]) == 2
        rule = "PTXVM_LIBRARY: must be libcudart.so.13 of the PTX machine"
        assert capsys.readouterr().err == f"ptxvm run: {rule}; got '{named}'\n"


def test_a_command_whose_children_launch(wrong, tmp_path, capfd):
    """A program that loads the machine as its runtime: its findings arrive through the log."""
    script = tmp_path / "launches.py"
    script.write_text(
        "import ctypes, os, sys\n"
        "vm = ctypes.CDLL('libcudart.so.13')\n"
        "vm.ptxvm_load.restype = ctypes.c_void_p\n"
        f"module = ctypes.c_void_p(vm.ptxvm_load(open({wrong!r}, 'rb').read()))\n"
        "x, out = (ctypes.c_float * 64)(), (ctypes.c_float * 64)()\n"
        "for array in (x, out): vm.ptxvm_register(array, ctypes.c_size_t(256), 1)\n"
        "values = [ctypes.c_uint64(ctypes.addressof(a)) for a in (x, out)] + [ctypes.c_float(1)]\n"
        "p = (ctypes.c_void_p * 3)(*map(ctypes.addressof, values))\n"
        "one = (ctypes.c_uint32 * 3)(1, 1, 1), (ctypes.c_uint32 * 3)(64, 1, 1)\n"
        "error = vm.ptxvm_launch(module, b'swap', *one, ctypes.c_uint32(0), p)\n"
        "print('launched', sys.argv[1:])\n"
        "os._exit(int(sys.argv[1]))\n"
    )
    assert main(["check", sys.executable, "--order", "forward", "--", str(script), "0"]) == 1
    out = capfd.readouterr().out
    assert "swap, line 18 [all 3 modes]\n" in out and "launched" not in out
    assert out.endswith("3 runs of 1 launch\n")
    assert main(["run", sys.executable, "--", str(script), "3"]) == 3
    out = capfd.readouterr().out
    assert "launched ['3']\n" in out and "exit status 3 of " in out
    assert main(["count", sys.executable, "--", str(script), "0"]) == 0
    assert "  1 launch, grid x block (1, 1, 1) x (64, 1, 1)\n" in capfd.readouterr().out


def test_a_program_whose_launch_is_refused(tmp_path, capfd):
    """Nothing was found, but not everything ran. The program itself exits with status 0."""
    script = tmp_path / "launches.py"
    script.write_text(
        "import ctypes, sys\n"
        "vm = ctypes.CDLL('libcudart.so.13')\n"
        "vm.ptxvm_load.restype = ctypes.c_void_p\n"
        "module = ctypes.c_void_p(vm.ptxvm_load(b'.entry none() { ret; }'))\n"
        "def launch(threads):\n"
        "  one, block = (ctypes.c_uint32 * 3)(1, 1, 1), (ctypes.c_uint32 * 3)(threads, 1, 1)\n"
        "  vm.ptxvm_launch(module, b'none', one, block, ctypes.c_uint32(0), None)\n"
        "launch(32)\n"
        "launch(int(sys.argv[1]))\n"
        "sys.exit(sys.prefix != sys.argv[2])\n"  # a virtual environment must be preserved
    )
    modes = ["--order", "forward", "--async", "latest"]
    command = ["check", sys.executable, *modes, "--", str(script)]
    assert main([*command, "32", sys.prefix]) == 0
    assert capfd.readouterr().out.endswith(": 0 findings; 1 run of 2 launches\n")
    assert main([*command, "2048", sys.prefix]) == 3
    out = capfd.readouterr().out
    assert out.startswith("refused: none: launch: ")
    assert out.endswith(": 0 findings; 1 run of 1 launch; 1 launch refused\n")
    assert main([*command[:-2], "--json", *command[-2:], "32", "nosuch"]) == 3
    (run,) = json.loads(capfd.readouterr().out)["runs"]
    assert run["status"] == 1 and run["output"] == ""


@pytest.mark.skipif(toolchain.nvcc() is None, reason="nvcc is not installed")
def test_a_shared_object_with_source_lines(tmp_path, capfd):
    source, library = tmp_path / "hand.cu", tmp_path / "hand.so"
    source.write_text(
        "__global__ void hand(int* out) {\n"
        "  __shared__ int line[64];\n"
        "  line[threadIdx.x] = threadIdx.x;\n"
        "  out[threadIdx.x] = line[63 - threadIdx.x];\n"
        "}\n"
        'extern "C" int work() {\n'
        "  int* out;\n  cudaMalloc(&out, 256);\n  hand<<<1, 64>>>(out);\n"
        "  return cudaDeviceSynchronize();\n}\n"
    )
    flags = ["-cudart=shared", "-shared", "-Xcompiler=-fPIC", "-lineinfo", "-O1"]
    flags += ["-gencode=arch=compute_80,code=compute_80", "--compress-mode=none"]
    subprocess.run([toolchain.nvcc(), *flags, str(source), "-o", str(library)], check=True)
    static = tmp_path / "static.so"
    command = [toolchain.nvcc(), "-cudart=static", *flags[1:], str(source), "-o", str(static)]
    subprocess.run(command, check=True)
    assert main(["check", str(static), "--entry", "work"]) == 2
    assert "has the static one: link it with nvcc -cudart shared" in capfd.readouterr().err
    modes = ["--order", "forward", "--async", "latest"]
    assert main(["check", str(library), "--entry", "work", *modes]) == 1
    out = capfd.readouterr().out
    assert "race with a write: hand(int*), line " in out and "hand.cu:4" in out
    assert main(["run", str(library), "--entry", "nosuch"]) == 3
    assert "nosuch" in capfd.readouterr().err


@pytest.mark.skipif(toolchain.nvcc() is None, reason="nvcc is not installed")
def test_the_program_of_the_guide(tmp_path, capfd):
    source, program = Path(__file__).with_name("mailbox.cu"), tmp_path / "mailbox"
    flags = ["-cudart=shared", "-lineinfo", "-gencode=arch=compute_80,code=compute_80"]
    flags += ["--compress-mode=none", "-o", str(program)]
    subprocess.run([toolchain.nvcc(), *flags, str(source)], check=True)
    assert main(["check", str(program), "--json"]) == 1
    document = json.loads(capfd.readouterr().out)
    (finding,) = document["findings"]
    assert (
        finding["rule"] == "race with a write" and "mailbox.cu:12): ld.global" in finding["report"]
    )
    assert len(finding["modes"]) == 6 and "count" not in finding


def test_arguments_as_text(tmp_path):
    struct = arguments.Parameter("b8", "p", 4, 4)
    assert arguments.make("bytes:00ff1234", struct).tobytes() == bytes.fromhex("00ff1234")
    assert arguments.make("0x10", arguments.Parameter("u32", "n", 0, 4)) == np.uint32(16)
    assert arguments.make("-1", arguments.Parameter("s64", "n", 0, 8)).dtype == np.int64
    bits = arguments.make("bf16[2,2]=1.00390625", None)  # a tie: rounds to even
    assert bits.shape == (2, 2) and set(bits.ravel().tolist()) == {0x3F80}
    assert np.isnan(arguments.readable(arguments.make("bf16[1]=nan", None), "bf16")).all()
    draws = [arguments.make(f"f16[100]=random{seed}", None) for seed in ("", ":0", ":1")]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "f.npy", np.float32([1, 2]))
    assert arguments.make(f"bf16[2]={tmp_path / 'f.npy'}", None).tolist() == [0x3F80, 0x4000]
    for bad in (
        "u8[4]=256",
        "u8[4]=0.5",
        "f32[]=0",
        "i32[99999999999]=0",
        "f32[2]=no.npy",
        "a=b=c",
        "f16[4]=1e10",
        f"u8[{','.join(['1'] * 40)}]=0",
        f"i32[2]={tmp_path / 'empty.npy'}",
        f"i32[2]={tmp_path / 'f.npy'}",
    ):
        with pytest.raises(arguments.BadArgument, match="must"):
            arguments.make(bad, None)
    for bad in ("bytes:00", "bytes:xyz", "7"):
        with pytest.raises(arguments.BadArgument, match="4 bytes"):
            arguments.make(bad, struct)


def test_parameters_have_the_size_that_the_machine_says():
    text = ".entry k(.param .f16x2 pairs[2], .param .b128 wide, .param .align 4 .b8 s[3]) { ret; }"
    kernel_ = arguments.Kernel.of("k", ptxvm.machine().load(text).parameters["k"])
    given = [f"bytes:{'ab' * size}" for size in (8, 16, 3)]
    assert [x.nbytes for x in arguments.for_kernel(kernel_, given)] == [8, 16, 3]
    for i, bad in ((0, "7"), (1, "7"), (1, "b128=7"), (2, "bytes:00"), (2, "u32=1")):
        with pytest.raises(arguments.BadArgument, match=rf"number {i} \(.* must (be|have)"):
            arguments.for_kernel(kernel_, [*given[:i], bad, *given[i + 1 :]])


def test_kernels_of_a_text():
    module = ptxvm.machine().load(
        "// .entry not()\n.visible .entry a(\n\t.param .u64 .ptr .align 1 a_0,\n"
        "\t.param .align 8 .b8 a_1[24], .param .f32 a_2\n)\n.maxntid 32, 1, 1\n{ ret; }\n"
        ".func f(.param .b32 x) { ret; }\n.entry b { ret; }"
    )
    found = [arguments.Kernel.of(*each) for each in module.parameters.items()]
    assert [str(each) for each in found] == ["a(.u64 a_0, .b8 a_1[24], .f32 a_2)", "b()"]
    assert [parameter["bytes"] for parameter in module.parameters["a"]] == [8, 24, 4]


def test_binaries_are_read(tmp_path):
    found = binary.read(LIBRARY)
    assert found and not found.is_program and found.runtime is None and not found.has_kernels
    assert binary.read(Path(shutil.which("true") or sys.executable)).is_program
    cut = tmp_path / "cut"
    cut.write_bytes(LIBRARY.read_bytes()[:100])
    assert binary.read(cut) is None and binary.read(Path(__file__)) is None


def test_the_example_runs():
    assert doctest.testmod(ptxvm) == (0, 7)


TWICE = """
.visible .entry twice(.param .u64 x, .param .u32 n) {
.reg .b64 %d0; .reg .b32 %r<2>;
ld.param.u64 %d0, [x]; ld.param.u32 %r0, [n];
st.global.u32 [%d0], %r0;
ret; }
"""


def test_an_interrupt_ends_a_launch():
    before = signal.getsignal(signal.SIGINT)
    with kernel._interruptible():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_a_launch_with_wrong_arguments():
    module = ptxvm.machine().load(TWICE)
    x, n = np.zeros(4, np.int32), np.int32(7)
    module.launch("twice", x, n, grid=np.int64(1), block=(np.int32(1),))
    assert x.tolist() == [7, 0, 0, 0]
    meta = torch.empty(4, device="meta")
    for given, launch, message in (
        ((x,), {}, "twice: arguments: must be 2 (x, n); got 1"),
        ((n, n), {}, "twice: argument 0 (x): must have 8 bytes; got 4"),
        ((x, np.int64(7)), {}, "twice: argument 1 (n): must have 4 bytes; got 8"),
        ((x, 7), {}, "twice: argument 1 (n): must be an array, or a scalar of NumPy or ctypes"),
        ((x[::2], n), {}, "twice: argument 0 (x): must be contiguous; got strides (8,)"),
        ((meta, n), {}, "twice: argument 0 (x): must be on the CPU; got meta"),
        ((x, n), {"grid": (1 << 32) + 1}, "twice: grid: must be from 0 to 4294967295; got 4294"),
        ((x, n), {"grid": (1, 1, 1, 7)}, "twice: grid: must be 1 to 3 extents; got (1, 1, 1, 7)"),
        ((x, n), {"shared": 1 << 32}, "twice: shared: must be from 0 to 4294967295; got 4294967"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            module.launch("twice", *given, **launch)
