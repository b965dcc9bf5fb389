"""What is particular to Triton: the code that its compiler makes of the kernels, what an import
costs, and memory that no length may reach. tests/test_contract.py and test_attention.py check the
results.

As a script, it compiles the kernels of attention without a GPU and prints what they use:
python tests/dense/test_attention_triton.py CAPABILITY [softmax:float16:64:causal relu,sum:... ...]
"""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch
import triton_compiler
from triton_compiler import OPERANDS, SHARED, assert_fits, fresh_process, resources

import tokenmill as tm

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# kind and normalize, dtype, head dimension, mask: every dtype with both head dimensions. Sums of
# weights in float32 and weights without a bound in float16 take most; relu looks again for NaN.
CASES = (
    "softmax:float16:64:causal",
    "sigmoid:float16:128:plain",
    "sigmoid:bfloat16:64:window",
    "softmax:bfloat16:128:causal",
    "sigmoid:float32:64:causal",
    "softmax:float32:128:plain",
    "softmax:float16:64:causal:every term",
    "elu1,sum:float16:64:window:every term",
    "taylor2,sum:float32:64:causal",
    "relu,count:bfloat16:128:plain",
)
MASKS = {
    "plain": (False, -1, -1),
    "causal": (True, -1, -1),
    "window": (False, 100, 20),
}


def lowered(kind, dtype, head_dim, mask, every_term=False, tokens=1024):
    """A call of attention, without data."""
    batch, heads, kv_heads = 2, 8, 2
    empty = functools.partial(torch.empty, device="meta")
    q = empty(batch, tokens, heads, head_dim, dtype=dtype)
    k = empty(batch, tokens, kv_heads, head_dim, dtype=dtype)
    terms = [None, 0.0, False, None, None, None, 0.0]
    if every_term:
        bias = empty(batch, 1, tokens, tokens, dtype=dtype)
        sink = empty(heads) if kind == "softmax" else None
        terms = [empty(batch, heads), -1.0, True, bias, empty(heads), sink, 5.0]
    causal, left, right = MASKS[mask]
    lengths = (None, None, None, None)
    kind, normalize = (*kind.split(","), "none")[:2]
    return (q, k, k, kind, normalize, 0.125, *terms, causal, left, right, *lengths, "accurate")


def compiled(capability, call):
    """The kernels that forward and backward of a call would launch."""
    from tokenmill.triton_kernels.dense import attention

    def launch():
        out, lse = attention.attention(*call)
        kind, normalize = call[3:5]
        lse = None if lse.numel() == 0 else lse
        kept = out if kind == "softmax" or normalize == "sum" else None
        attention.attention_backward(out, lse, kept, lse, *[True] * 4, *call)

    return triton_compiler.compiled(capability, launch)


def main(capability, *cases):
    for case in cases:
        kind, dtype, head_dim, mask, *terms = case.split(":")
        call = lowered(kind, getattr(torch, dtype), int(head_dim), mask, bool(terms))
        for kernel, code in compiled(int(capability), call):
            print(json.dumps({"case": case, **resources(kernel, code)}), flush=True)


run = functools.partial(fresh_process, __file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module", params=SHARED)
def programs(request, folder):
    """A compute capability, and what every kernel compiled for it uses."""
    text = run(__file__, request.param, *CASES, folder=folder)
    return request.param, [json.loads(line) for line in text.splitlines()]


def test_every_kernel_compiles_without_spilling_registers(programs):
    capability, found = programs
    biased = [c for c in CASES if "every term" in c]  # dbias has a kernel of its own
    assert len(found) == 3 * len(CASES) + len(biased)
    for program in found:
        assert_fits(program, capability)


def test_products_run_on_tensor_cores(programs):
    capability, found = programs
    for program in found:
        operand = OPERANDS[program["case"].split(":")[1]]
        assert program["products"], program
        for product in program["products"]:
            assert f".f32.{operand}.{operand}" in product, program
            assert capability == 90 or product.startswith("mma.sync."), program


def test_float32_products_split_their_operands(programs):
    """tf32 alone has 11 bits."""
    for program in programs[1]:
        if ":float32:" in program["case"]:
            assert program["precisions"] == ["tf32x3"], program


def test_no_length_compiles_anew(folder):
    code = """
import torch
from test_attention_triton import compiled, lowered

calls = [lowered("softmax", torch.float16, 64, "causal", tokens=n) for n in (1024, 1023, 1)]
first, *others = [[code for _, code in compiled(80, call)] for call in calls]
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    run("-c", code, folder=folder)


def test_import_needs_no_gpu_and_starts_none(folder):
    code = """
import torch
import tokenmill.triton_kernels.dense.attention
import tokenmill.triton_kernels.dense.merge_attention_states

assert not torch.cuda.is_initialized()
"""
    run("-c", code, folder=folder, CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_length_reaches_beyond_the_tensors(kind):
    """Lengths inside tensors are not checked: NaN around the tokens shows what was read."""
    least, most = -(2**31), 2**31 - 1
    around = torch.full((3, 60, 2, 16), torch.nan, device=DEVICE)
    tokens = around[:, 20:40]
    tokens.copy_(torch.randn(tokens.shape))
    q, k, v = (t.requires_grad_() for t in tokens.detach())
    for ends in ([least, most, least, most], [-5, 7, 3, 21], [most, most, 7, least]):
        cu = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        out = tm.attention(q, k, v, kind=kind, cu_seqlens_q=cu, backend="triton")
        for result in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
            assert torch.isfinite(result).all()
    assert torch.isnan(around[:, :20]).all() and torch.isnan(around[:, 40:]).all()


if __name__ == "__main__":
    main(*sys.argv[1:])
