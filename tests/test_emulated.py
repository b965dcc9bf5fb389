"""The compiled CUDA kernels in the PTX machine: the call path, and reporting of faults."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenmill as tm
from tokenmill._call import choose, library

BUILT = library.emulated_built()
built = pytest.mark.skipif(not BUILT, reason="only a development build has it (TOKENMILL_PTXVM=1)")


def states(parts=3, shape=(2, 9, 3, 40)):
    outs = torch.randn(parts, *shape)
    return outs, torch.randn(parts, *shape[:-3], shape[-2], shape[-3])


@built
def test_results_come_from_the_machine():
    from tokenmill import _emulator

    args = states()
    want = tm.merge_attention_states(*args, backend="reference")
    for backend, kernels in (("emulated", 1), ("cpu", 0)):
        with _emulator.counting() as launches:
            got = tm.merge_attention_states(*args, backend=backend)
        assert len(launches) == kernels
        for output, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(output, wanted)


@built
def test_it_runs_only_if_asked(monkeypatch):
    args = states()
    assert tm.explain("merge_attention_states", *args).backend == "cpu"
    with tm.testing.emulated_cuda():
        explained = tm.explain("merge_attention_states", *args)
        assert explained.backend == "emulated"
        assert "in the PTX machine" in explained.kernel
        assert tm.explain("merge_attention_states", *args, backend="cpu").backend == "cpu"
    monkeypatch.setenv("TOKENMILL_BACKEND", "emulated")
    assert tm.explain("merge_attention_states", *args).backend == "emulated"


@built
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("attention", "softmax"),
        ("attention", "sigmoid"),
        ("block_sparse_attention", "list of each KV head"),
        ("bilevel_routing_attention", "a graph for all heads"),
    ],
)
def test_no_query_heads_leave_gradients_of_zero(op, name):
    """No launch is planned for them, and nothing divides by their number."""
    spec = tm.registry.get(op)
    sample = next(s for s in spec.samples if s.name == name)
    args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
    leaves = [args[0][..., :0, :].requires_grad_(), *(a.requires_grad_() for a in args[1:3])]
    outputs = spec.function(*leaves, *args[3:], **kwargs, backend="emulated")
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    for gradient in torch.autograd.grad(outputs[0].sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@built
def test_other_dtypes_and_devices_are_refused():
    outs, lses = states()
    with pytest.raises(RuntimeError, match="float64 runs only on the reference backend"):
        tm.merge_attention_states(outs.double(), lses.double(), backend="emulated")
    with pytest.raises(RuntimeError, match="the tensors are on meta"):
        tm.merge_attention_states(outs.to("meta"), lses.to("meta"), backend="emulated")


@pytest.mark.skipif(BUILT, reason="this build has it")
def test_a_release_build_says_that_it_lacks_it():
    args = states()
    with pytest.raises(RuntimeError, match=r"not in this build \(TOKENMILL_PTXVM=1\)"):
        tm.merge_attention_states(*args, backend="emulated")
    assert "emulated" not in choose.BACKENDS and "emulated" not in tm.backends()


@built
def test_a_fault_is_an_exception_and_the_machine_goes_on():
    outs, lses = states()
    freed = outs.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"(?s)merge_attention_states: .*merge_slices_kernel"):
        tm.merge_attention_states(freed, lses, backend="emulated")
    want = tm.merge_attention_states(outs, lses, backend="reference")
    torch.testing.assert_close(tm.merge_attention_states(outs, lses, backend="emulated"), want)


@built
def test_devices_differ_in_their_limits():
    from tokenmill import _emulator

    args = states()
    want = tm.merge_attention_states(*args, backend="reference")
    for device in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"):
        with tm.testing.emulated_cuda(device=device):
            got = tm.merge_attention_states(*args)
        for output, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(output, wanted)
    names = "sm_80, sm_86, sm_89, sm_90a or sm_120"
    with pytest.raises(ValueError, match=f"device: must be {names}; got sm_70"):
        _emulator.configure("device=sm_70")
    with (
        pytest.raises(ValueError, match="got H100"),
        tm.testing.emulated_cuda(device="H100"),
    ):
        pass


@built
@pytest.mark.parametrize("ends", [(0, 2**30, 9), (-(2**30), 4, 9), (9, 4, 0), (0, 0, 2**31 - 1)])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_bad_lengths_never_reach_beyond_a_tensor(kind, ends):
    """Values inside tensors cost CUDA no synchronization: kernels clamp them."""
    q, k, v = (torch.randn(9, 2, 32, requires_grad=True) for _ in range(3))
    good = torch.tensor([0, 4, 9], dtype=torch.int32)
    bad = torch.tensor(ends, dtype=torch.int32)
    for cu_q, cu_k in ((bad, good), (good, bad), (bad, bad)):
        out = tm.attention(
            q, k, v, kind=kind, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend="emulated"
        )
        torch.autograd.grad(out.sum(), (q, k, v))


@built
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_bias_below_the_longest_sequence_is_not_overrun(kind, rows):
    """max_seqlen bounds the bias, and kernels cannot see that a sequence is longer."""
    q, k, v = (torch.randn(45, 2, 32, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, 5, 45], dtype=torch.int32)
    shape = (2 if rows > 1 else 1, 2, rows, 16)
    bias = torch.randn(shape, requires_grad=True)

    def call(backend, ends, size, max_seqlen):
        cut = [t[:size] for t in (q, k, v)]
        out = tm.attention(
            *cut,
            kind=kind,
            bias=bias[: len(ends) - 1],
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            backend=backend,
        )
        return out, torch.autograd.grad(out[:5].sum(), (q, bias))

    out, (dq, dbias) = call("emulated", ends, 45, 16)
    want, (dq_want, dbias_want) = call("reference", ends[:2], 5, 16)
    torch.testing.assert_close(out[:5], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dq[:5], dq_want[:5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dbias, dbias_want, atol=1e-5, rtol=1e-5)


def test_the_package_can_load_it_from_elsewhere(tmp_path):
    code = "import tokenmill as tm; print('emulated' in tm.backends())"
    for path, there in ((tmp_path / "none.so", "False"), (Path(library.__file__), "True")):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"TOKENMILL_EMULATED": str(path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == there


@built
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rule", ["segments", "ranges"])
def test_tensor_work_of_documents_is_that_of_their_tiles(dtype, rule):
    """A call with four documents takes as much, forward and backward, as four calls with one
    each."""
    from tokenmill import _emulator

    length, copies = 64, 4

    def work(documents):
        tokens = documents * length
        shape = (1, tokens, 1, 32)
        q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
        first = torch.arange(tokens, dtype=torch.int32) // length
        mask = tm.masks.segments(first[None])
        if rule == "ranges":
            begin = (first * length).view(1, 1, -1, 1)
            mask = tm.masks.ranges(begin, begin + length)
        with _emulator.counting() as launches:
            tm.attention(q, k, v, mask=mask, backend="emulated").sum().backward()
        return sum(launch["mma"] for launch in launches)

    one = work(1)
    assert copies * one <= work(copies) <= 1.1 * copies * one


@built
@pytest.mark.parametrize("device", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("attention", "causal, more keys"),
        ("attention", "sigmoid"),
        ("attention_decode", "wide heads"),
    ],
)
def test_budgets_hold_where_tensor_cores_truncate(op, name, device):
    """mma=hardware (ptxvm/docs/guide.md): the error budget of half precision covers it."""
    from tokenmill import _emulator

    spec = tm.registry.get(op)
    sample = next(s for s in spec.samples if s.name == name)
    with _emulator.configured(f"mma=hardware,device={device}"):
        for dtype in (torch.float16, torch.bfloat16):
            found = tm.testing.compare(spec, sample, "emulated", dtype, device="cpu")
            assert found and not [c for c in found if not c.ok]


@built
def test_the_examples_of_the_machine_s_functions_run():
    from tokenmill import _emulator

    results = doctest.testmod(_emulator)
    assert results.attempted and not results.failed


def test_a_setting_without_a_value():
    from tokenmill import _emulator

    with pytest.raises(ValueError, match="settings: must be NAME=VALUE; got 'check'"):
        _emulator._options("count=1,check")
