"""Resources that Triton's compiler gives the kernels of the causal convolutions. The tests of the
operators check the results."""

from __future__ import annotations

import functools

import torch
from triton_compiler import assert_fits

from tokenmill import registry

# dtype, width, options
CASES = ("bfloat16:4:packed", "float32:8")


def call(case, tokens=1024):
    """The kernels of forward, backward and decode, on meta tensors."""
    from tokenmill.triton_kernels.linear.causal_conv1d import (
        causal_conv1d,
        causal_conv1d_backward,
    )
    from tokenmill.triton_kernels.linear.causal_conv1d_decode import causal_conv1d_decode

    dtype, width, *options = case.split(":")
    sequences, channels, packed = 2, 512, "packed" in options
    empty = functools.partial(torch.empty, device="meta", dtype=getattr(torch, dtype))
    x = empty(sequences * tokens, channels) if packed else empty(sequences, tokens, channels)
    cu = empty(sequences + 1, dtype=torch.int32) if packed else None
    weight, bias, state = (
        empty(*shape)
        for shape in (
            (channels, int(width)), (channels,), (sequences, channels, int(width) - 1)
        )
    )  # fmt: skip
    spec, step = (registry.get(f"causal_conv1d{s}") for s in ("", "_decode"))
    a = spec.record(
        x, weight, bias, activation="silu", initial_state=state, return_final_state=True,
        cu_seqlens=cu,
    )  # fmt: skip
    b = step.record(empty(sequences, channels), state, weight, bias, activation="silu")

    def launch():
        out, final = causal_conv1d(a)
        causal_conv1d_backward(spec.backward.record(out, final, True, *a))
        causal_conv1d_decode(b)

    return launch


def test_every_kernel_compiles_without_spilling_registers(programs):
    for program in programs:
        assert_fits(program)
    assert {program["kernel"] for program in programs} == {
        "forward_kernel", "final_kernel", "filter_kernel", "input_kernel", "initial_kernel",
        "decode_kernel",
    }  # fmt: skip


def test_no_length_compiles_anew(compiles_once):
    sizes = (1024,), (1023,), (130,)
    compiles_once({"bfloat16:4:packed": sizes})
