"""Triton specifics of linear attention: the code that its compiler generates, and memory that no
value inside tensors may reach. tests/test_contract.py and the other files here check the
results."""

from __future__ import annotations

import functools

import pytest
import torch
from tier import daily
from triton_compiler import OPERANDS, assert_fits

import tokenmill as tm
from tokenmill import registry
from tokenmill.linear._state import feature_dim

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# feature map, dtype, head_dim of keys and values, decay, options: every value of each; --full: more
# combinations.
CASES = daily(
    "identity:bfloat16:128:128:head",
    "relu:float16:128:64:token:packed",
    "taylor2:float16:32:64:token:normalized",
    "elu1:float32:256:256:token:normalized",
    "silu:float16:64:64:none",
    "identity:bfloat16:64:64:channel",
    full=(
        "identity:float32:128:128:channel:packed",
        "elu1:bfloat16:256:256:token:normalized",
        "taylor2:bfloat16:16:64:none",
        "identity:float32:128:128:head",
        "taylor2:float32:16:64:head:normalized",
    ),
)
# Kernels with matrix products; the last three are of decays per channel.
PRODUCTS = (
    *("sums", "results", "results_again", "queries", "keys", "values", "decay"),
    *("states", "gradients", "chunk"),
)


def call(case, tokens=1024):
    """Forward, backward and decode on meta tensors."""
    from tokenmill.triton_kernels.linear.linear_attention import (
        linear_attention,
        linear_attention_backward,
    )
    from tokenmill.triton_kernels.linear.linear_attention_decode import linear_attention_decode

    feature_map, dtype, head_dim, value_dim, decay, *options = case.split(":")
    dtype, head_dim, value_dim = getattr(torch, dtype), int(head_dim), int(value_dim)
    sequences, heads, kv_heads = 2, 8, 2
    empty = functools.partial(torch.empty, device="meta")
    packed, normalize = "packed" in options, "normalized" in options
    lead = (sequences * tokens,) if packed else (sequences, tokens)
    q = empty(*lead, heads, head_dim, dtype=dtype)
    k = empty(*lead, kv_heads, head_dim, dtype=dtype)
    v = empty(*lead, kv_heads, value_dim, dtype=dtype)
    decays = {"none": None, "head": empty(heads), "token": empty(*lead, heads)}
    if decay == "channel":  # as lowered: k and v have the heads of q
        decays["channel"] = empty(*lead, heads, head_dim)
        k, v = (t.repeat_interleave(heads // kv_heads, -2) for t in (k, v))
    log_decay = decays[decay]
    columns = value_dim + int(normalize)
    state = empty(sequences, heads, feature_dim(feature_map, head_dim), columns)
    cu = empty(sequences + 1, dtype=torch.int32) if packed else None
    how = {"log_decay": log_decay, "feature_map": feature_map, "scale": 0.125}
    how["normalize"] = normalize
    spec, decode = map(registry.get, ("linear_attention", "linear_attention_decode"))

    def launch():
        a = spec.record(q, k, v, **how, initial_state=state, return_final_state=True, cu_seqlens=cu)
        out, final, z = linear_attention(a)
        saved = (out, z) if normalize else (None, None)
        needs = log_decay is not None, True
        linear_attention_backward(spec.backward.record(out, final, *saved, *needs, *a))
        if not packed:
            slots, accepted = (
                empty(sequences, dtype=torch.int32),
                empty(sequences, dtype=torch.int32),
            )
            step = decode.record(q, k, v, state, **how, state_indices=slots, accepted=accepted)
            linear_attention_decode(step)

    return launch


def test_every_kernel_compiles_without_spilling_registers(programs):
    for program in programs:
        assert_fits(program)
    kernels = {program["kernel"].removesuffix("_kernel") for program in programs}
    assert kernels == {*PRODUCTS, "scan", "delta", "sum_chunks", "decode"}


def test_products_run_on_tensor_cores(programs):
    """Stored 16-bit numbers are multiplied as they are, computed ones in tf32, and everything in
    float32 calls in tf32x3: plain tf32 has 11 bits. With a decay per channel everything is."""
    for program in programs:
        name = program["kernel"].removesuffix("_kernel")
        if name not in PRODUCTS:
            assert not program["products"], program
            continue
        dtype = program["case"].split(":")[1]
        stored = OPERANDS[dtype]
        assert program["products"], program
        for product in program["products"]:
            types = product.split(".f32", 1)[1]
            assert types.startswith((f".{stored}.{stored}", ".tf32.tf32")), program
            assert program["capability"] == 90 or product.startswith("mma.sync."), program
        precise = dtype == "float32" or name in ("states", "gradients", "chunk")
        assert program["precisions"] == ["tf32x3" if precise else "tf32"], program


def test_no_length_compiles_anew(compiles_once):
    cases = (
        "identity:float16:64:64:head",
        "elu1:bfloat16:64:64:token:normalized",
        "relu:float16:64:64:token:packed",
    )
    compiles_once(dict.fromkeys(cases, ((1024,), (1023,), (130,))))


def surrounded(*shape):
    """A tensor with NaN on both sides of its first dimension, which reveals out-of-bounds reads."""
    around = torch.full((3 * shape[0], *shape[1:]), torch.nan, device=DEVICE)
    inner = around[shape[0] : 2 * shape[0]]
    inner.copy_(torch.randn(shape))
    return around, inner


@pytest.mark.parametrize("ends", [(5, 7, 3, 21), "extremes", (20, 0, 40, 7)], ids=str)
def test_no_length_reaches_beyond_the_tensors(ends):
    """Lengths inside tensors are not checked."""
    if ends == "extremes":
        ends = (-(2**31), 2**31 - 1, -(2**31), 2**31 - 1)
    cu = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    arounds, tokens = zip(*(surrounded(20, 2, 16) for _ in range(3)), strict=True)
    q, k, v = (t.detach().requires_grad_() for t in tokens)
    gate = torch.zeros(20, 2, device=DEVICE, requires_grad=True)
    out = tm.linear_attention(
        q, k, v, log_decay=gate, cu_seqlens=cu, chunk_size=16, backend="triton"
    )
    torch.autograd.grad(out.sum(), (q, k, v, gate))
    for around in arounds:
        assert torch.isnan(around[:20]).all() and torch.isnan(around[40:]).all()
        assert torch.isfinite(around[20:40]).all()


def test_no_slot_reaches_beyond_the_states():
    around, state = surrounded(4, 2, 16, 8)
    before = state.clone()
    q, k = torch.randn(2, 5, 1, 2, 16, device=DEVICE)
    v = torch.randn(5, 1, 2, 8, device=DEVICE)
    slots = torch.tensor([-1, 4, 2, 2**31 - 1, -(2**31)], dtype=torch.int32, device=DEVICE)
    out = tm.linear_attention_decode(q, k, v, state, state_indices=slots, backend="triton")
    assert torch.isnan(around[:4]).all() and torch.isnan(around[8:]).all()
    assert torch.isfinite(around[4:8]).all()
    changed = (state != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]
    assert (out[2] != 0).any() and not out[[0, 1, 3, 4]].any()
