"""Compiles Triton kernels without a GPU, and reads the resources of the compiled code.

A test file has `call(case, *sizes)`, which returns a function that launches kernels, and CASES for
the fixture `programs`. Triton keeps the code in its cache, by kernel, types, options and its own
version: what it has compiled before is read from there. As a script, prints the resources of the
kernels of some cases: python tests/triton_compiler.py TEST_FILE CAPABILITY [CASE ...]
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from tier import FULL

REGISTERS = 255  # per thread
# KiB per program, by compute capability; 8.6 and 8.9 run the code of 8.0 in 99.
SHARED = {80: 99, 90: 227} if FULL else {90: 227}
OPERANDS = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}  # in PTX names of products


class Target:
    """Stand-in for the driver, which needs a GPU."""

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compiled(capability, call):
    """The kernels that call() would launch, and their code."""
    import triton

    kernels = []
    run = triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        kernels.append((kernel, run(kernel, *args, grid=grid, warmup=True, **options)))

    triton.runtime.driver.set_active(Target(capability))
    with mock.patch.object(triton.JITFunction, "run", compile_only):
        call()
    return kernels


def resources(kernel, code):
    """ptxas resources of a kernel. Spilled registers are in local memory."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code.asm["cubin"])
        cubin.flush()
        command = [cuobjdump, "--dump-resource-usage", cubin.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    products = re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.\S+|tcgen05\.mma\S+", code.asm["ptx"])
    return {
        "kernel": kernel.__name__,
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": code.metadata.shared,
        "products": sorted({re.sub(r"\.m\d+n\d+k\d+", "", p) for p in products}),
        "fma": "fma.rn.f32" in code.asm["ptx"],
        "precisions": sorted(set(re.findall(r"inputPrecision = (\w+)", code.asm["ttir"]))),
    }


def assert_fits(program):
    assert program["spilled"] == 0, program
    assert program["registers"] <= REGISTERS, program
    assert program["shared"] <= SHARED[program["capability"]] * 1024, program


def assert_multiplies(program, *dtypes):
    """Asserts that products run on tensor cores, each in the operands of one of the dtypes."""
    operands = [f".f32.{OPERANDS[dtype]}.{OPERANDS[dtype]}" for dtype in dtypes]
    assert program["products"], program
    for product in program["products"]:
        assert any(operand in product for operand in operands), program


class Processes:
    """Forks processes from one that has Triton and tokenmill imported, and has compiled nothing.
    Importing takes longer than most kernels. Interpretation is decided on import: a process of
    Python's fork server, which may interpret, cannot compile."""

    def __init__(self):
        inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        inherited["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        self.server = subprocess.Popen(
            [sys.executable, __file__, "serve"],
            env=inherited, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, function, test, *arguments):
        """What a function of this file prints for a test file."""
        with tempfile.NamedTemporaryFile("r") as said:
            self.server.stdin.write(json.dumps((said.name, function, str(test), arguments)) + "\n")
            self.server.stdin.flush()
            status = self.server.stdout.readline()
            assert status == "0\n", said.read()
            return said.read()

    def close(self):
        self.server.communicate()


def serve():
    import triton.runtime.cache

    import tokenmill.triton_kernels.dense.attention  # noqa: F401 what other kernels import too

    triton.runtime.cache.triton_key()  # of all files of Triton, a second
    for line in sys.stdin:
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        said, function, test, arguments = json.loads(line)
        file = os.open(said, os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        globals()[function](load(test), *arguments)
        return


def load(test):
    sys.path.insert(0, str(Path(test).parent))
    return importlib.import_module(Path(test).stem)


@pytest.fixture(scope="session")
def processes():
    pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")
    forked = Processes()
    yield forked
    forked.close()


@pytest.fixture(scope="module", params=SHARED)
def programs(request, processes):
    """Resources of all kernels of the file's CASES, for each compute capability."""
    text = processes.run("describe", request.path, request.param, *request.module.CASES)
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def compiles_once(request, processes):
    """Asserts that cases launch the same code, of one kernel or of all, for all of their sizes."""

    def check(sizes_of_cases, kernel=None):
        processes.run("assert_compiles_once", request.path, sizes_of_cases, kernel)

    return check


def assert_compiles_once(module, sizes_of_cases, kernel):
    """Kernels compile to nothing: an object for each key under which Triton would keep code."""
    import triton.compiler

    triton.compiler.compile = lambda *_, **__: object()
    for case, sizes in sizes_of_cases.items():
        launched = [compiled(80, module.call(case, *size)) for size in sizes]
        first, *others = [
            [code for k, code in found if kernel in (None, k.__name__)] for found in launched
        ]
        assert first
        assert all(a is b for other in others for a, b in zip(first, other, strict=True)), case


def describe(module, capability, *cases):
    """Prints the resources of the kernels of some cases, or of all."""
    for case in cases or module.CASES:
        for kernel, code in compiled(capability, module.call(case)):
            found = {"case": case, "capability": capability, **resources(kernel, code)}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        describe(load(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
