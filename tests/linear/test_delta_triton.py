"""Resources that Triton's compiler gives the kernels of delta_attention. tests/test_contract.py and
test_delta_attention.py check the results."""

from __future__ import annotations

import functools

import torch
from triton_compiler import assert_fits

from tokenmill import registry

# dtype, head_dim of keys and values, decay and options
CASES = (
    "bfloat16:128:128:head:packed",
    "bfloat16:128:128:channel:l2norm",
    "float32:256:256:none",
    "float32:64:64:head",
)


def call(case, tokens=1024):
    """The kernels of forward and backward, on meta tensors."""
    from tokenmill.triton_kernels.linear.delta_attention import (
        delta_attention,
        delta_attention_backward,
    )
    from tokenmill.triton_kernels.linear.delta_attention_decode import delta_attention_decode

    dtype, head_dim, value_dim, kind, *options = case.split(":")
    sequences, heads, packed = 2, 8, "packed" in options
    empty = functools.partial(torch.empty, device="meta")
    lead = (sequences * tokens,) if packed else (sequences, tokens)
    q, k, v = (
        empty(*lead, count, int(n), dtype=getattr(torch, dtype))
        for count, n in ((heads // 2, head_dim), (heads // 2, head_dim), (heads, value_dim))
    )
    decays = {"none": None, "head": empty(*lead, heads)}
    decays["channel"] = empty(*lead, heads, int(head_dim))
    state = empty(sequences, heads, int(head_dim), int(value_dim))
    cu = empty(sequences + 1, dtype=torch.int32) if packed else None
    spec, decode = map(registry.get, ("delta_attention", "delta_attention_decode"))
    a = spec.record(
        q, k, v, empty(*lead, heads), log_decay=decays[kind], qk_l2norm="l2norm" in options,
        initial_state=state, return_final_state=True, cu_seqlens=cu,
    )  # fmt: skip

    def launch():
        out, final = delta_attention(a)
        delta_attention_backward(spec.backward.record(out, final, True, True, *a))
        if not packed:
            delta_attention_decode(
                decode.record(
                    q, k, v, a.beta, state, log_decay=a.log_decay, qk_l2norm=a.qk_l2norm,
                    state_indices=empty(sequences, dtype=torch.int32),
                    accepted=empty(sequences, dtype=torch.int32),
                )
            )  # fmt: skip

    return launch


def test_every_kernel_compiles_without_spilling_registers(programs):
    for program in programs:
        assert_fits(program)
        decodes = program["kernel"] == "decode_kernel"
        assert bool(program["products"]) != decodes, program  # on tensor cores
    kernels = {"states_kernel", "gradients_kernel", "chunk_kernel", "decode_kernel"}
    assert {program["kernel"] for program in programs} == kernels


def test_no_length_compiles_anew(compiles_once):
    sizes = (1024,), (1023,), (130,)
    compiles_once({"bfloat16:128:128:head:packed": sizes, "bfloat16:64:64:none": sizes})
