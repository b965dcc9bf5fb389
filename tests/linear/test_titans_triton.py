"""Resources that Triton's compiler gives the kernels of titans_memory. tests/test_contract.py and
test_titans_memory.py check the results.
As a script, it compiles the kernels without a GPU and prints their use of resources:
python tests/linear/test_titans_triton.py CAPABILITY [float16:64:64 ...]
"""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch
import triton_compiler
from triton_compiler import SHARED, assert_fits, fresh_process, resources, without_code

from tokenmill import registry

pytest.importorskip("triton")

# dtype, head_dim of keys and values, options
CASES = ("bfloat16:64:64:packed", "float32:128:128", "float32:256:64")


def compiled(capability, case, *, tokens=1024):
    """The kernels of forward and backward, on meta tensors."""
    from tokenmill.triton_kernels.linear.titans_memory import titans_memory, titans_memory_backward

    dtype, head_dim, value_dim, *options = case.split(":")
    sequences, heads, packed = 2, 8, "packed" in options
    empty = functools.partial(torch.empty, device="meta")
    lead = (sequences * tokens,) if packed else (sequences, tokens)
    q, k, v = (
        empty(*lead, heads, int(n), dtype=getattr(torch, dtype))
        for n in (head_dim, head_dim, value_dim)
    )
    gates = {name: empty(*lead, heads) for name in ("alpha", "eta", "theta")}
    state = empty(sequences, heads, int(head_dim), int(value_dim))
    cu = empty(sequences + 1, dtype=torch.int32) if packed else None
    spec = registry.get("titans_memory")
    a = spec.record(
        q, k, v, **gates, initial_state=(state, state), return_final_state=True, cu_seqlens=cu
    )

    def launch():
        out, memory, momentum = titans_memory(a)
        titans_memory_backward(spec.backward.record(out, memory, momentum, True, *a))

    return triton_compiler.compiled(capability, launch)


def main(capability, *cases):
    for case in cases or CASES:
        for kernel, code in compiled(int(capability), case):
            print(json.dumps({"case": case, **resources(kernel, code)}), flush=True)


run = functools.partial(fresh_process, __file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_without_spilling_registers(capability, folder):
    text = run(__file__, capability, *CASES, folder=folder)
    found = [json.loads(line) for line in text.splitlines()]
    for program in found:
        assert_fits(program, capability)
        assert program["products"], program  # on tensor cores
    assert {program["kernel"] for program in found} == {
        "states_kernel", "gradients_kernel", "block_kernel",
    }  # fmt: skip


def test_no_length_compiles_anew(folder):
    code = """
from test_titans_triton import compiled

for case in ("bfloat16:64:64:packed", "bfloat16:64:64"):
    first, *others = [[c for _, c in compiled(80, case, tokens=n)] for n in (1024, 1023, 130)]
    assert all(a is b for other in others for a, b in zip(first, other, strict=True)), case
"""
    without_code(__file__, code, folder=folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
