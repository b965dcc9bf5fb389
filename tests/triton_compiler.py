"""Compiles Triton kernels without a GPU, and reads the resources of the compiled code.

A test file has `call(case, *sizes)`, which returns a function that launches kernels, and CASES for
the fixture `programs`. As a script, prints the resources of the kernels of some cases:
TRITON_CACHE_DIR=/tmp/code python tests/triton_compiler.py TEST_FILE CAPABILITY [CASE ...]
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
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
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    dump = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
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


@pytest.fixture(scope="module", params=SHARED)
def programs(request, tmp_path_factory):
    """Resources of all kernels of the file's CASES, for each compute capability."""
    pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")
    test = request.path
    arguments = (__file__, test, request.param, *request.module.CASES)
    text = fresh_process(test, *arguments, folder=tmp_path_factory.mktemp("triton"))
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def compiles_once(request, tmp_path):
    """Asserts that cases launch the same code, of one kernel or of all, for all of their sizes."""
    pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

    def check(sizes_of_cases, kernel=None):
        arguments = request.path.stem, sizes_of_cases, kernel
        script = f"import triton_compiler\n\ntriton_compiler.assert_compiles_once(*{arguments!r})"
        fresh_process(request.path, "-c", script, folder=tmp_path)

    return check


def assert_compiles_once(test, sizes_of_cases, kernel):
    """Kernels compile to nothing: an object for each key under which Triton would keep code."""
    import triton.compiler

    triton.compiler.compile = lambda *_, **__: object()
    call = importlib.import_module(test).call
    for case, sizes in sizes_of_cases.items():
        launched = [compiled(80, call(case, *size)) for size in sizes]
        first, *others = [
            [code for k, code in found if kernel in (None, k.__name__)] for found in launched
        ]
        assert first
        assert all(a is b for other in others for a, b in zip(first, other, strict=True)), case


def fresh_process(test, *arguments, folder, **environment):
    """Runs Python on a test file, compiling into folder: interpretation is decided on import."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parent), inherited.get("PYTHONPATH", "")]
    inherited["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=inherited | {"TRITON_CACHE_DIR": str(folder)} | environment,
        cwd=Path(test).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def main(test, capability, *cases):
    sys.path.insert(0, str(Path(test).parent))
    module = importlib.import_module(Path(test).stem)
    for case in cases or module.CASES:
        for kernel, code in compiled(int(capability), module.call(case)):
            found = {"case": case, "capability": int(capability), **resources(kernel, code)}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
