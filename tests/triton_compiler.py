"""Compiles Triton kernels without a GPU, and reads the resources of the compiled code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

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
        "precisions": sorted(set(re.findall(r"inputPrecision = (\w+)", code.asm["ttir"]))),
    }


def assert_fits(program, capability):
    assert program["spilled"] == 0, program
    assert program["registers"] <= REGISTERS, program
    assert program["shared"] <= SHARED[capability] * 1024, program


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


def without_code(test, script, *, folder):
    """Runs a script in which kernels compile to nothing: to one object for each key under which
    Triton would keep the code."""
    nothing = "import triton.compiler\n\ntriton.compiler.compile = lambda *_, **__: object()\n"
    return fresh_process(test, "-c", nothing + script, folder=folder)
