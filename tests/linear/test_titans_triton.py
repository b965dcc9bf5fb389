"""Resources that Triton's compiler gives the kernels of titans_memory. tests/test_contract.py and
test_titans_memory.py check the results."""

from __future__ import annotations

import functools

import torch
from triton_compiler import assert_fits

from tokenmill import registry

# dtype, head_dim of keys and values, options
CASES = ("bfloat16:64:64:packed", "float32:128:128", "float32:256:64")


def call(case, tokens=1024):
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

    return launch


def test_every_kernel_compiles_without_spilling_registers(programs):
    for program in programs:
        assert_fits(program)
        assert program["products"], program  # on tensor cores
    kernels = {"states_kernel", "gradients_kernel", "block_kernel"}
    assert {program["kernel"] for program in programs} == kernels


def test_no_length_compiles_anew(compiles_once):
    sizes = (1024,), (1023,), (130,)
    compiles_once({"bfloat16:64:64:packed": sizes, "bfloat16:64:64": sizes})
