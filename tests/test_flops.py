"""Operation counts that PyTorch's FlopCounterMode reports."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tokenmill as tm
from tokenmill import registry
from tokenmill._flops import band
from tokenmill.reference.dense._common import visible_pairs

SPECS = list(registry.ops().values())


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_the_counter_counts_forward_and_backward(spec):
    args, kwargs = spec.samples[0].make(torch.float32, torch.Generator().manual_seed(0))
    run = tm.testing.without_side_effects(spec, spec.function)
    with FlopCounterMode(display=False) as counter:
        tm.testing.evaluate(run, args, kwargs)
    want = round(spec.flops(spec.record(*args, **kwargs)))
    assert counter.get_total_flops() == want
    if spec.backward:
        outputs, _ = tm.testing.evaluate(run, args, kwargs)
        with FlopCounterMode(display=False) as counter:
            tm.testing.evaluate(run, args, kwargs, list(map(torch.ones_like, outputs)))
        assert want > 0
        counted = counter.get_flop_counts()["Global"]
        assert counted[getattr(torch.ops.tokenmill, spec.backward.name)] > 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_shapes_alone_count_at_least_as_much(spec):
    args, kwargs = spec.samples[0].make(torch.float32, torch.Generator().manual_seed(0))
    record = spec.record(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in record]
        with FlopCounterMode(display=False) as counter:
            spec.forward.run("tokenmill", fake)
    assert counter.get_total_flops() >= round(spec.flops(record))


def test_packed_sequences_count_one_by_one():
    q = torch.randn(12, 2, 4)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        tm.attention(q, q, q, cu_seqlens_q=cu_seqlens)
    assert counter.get_total_flops() == 2 * 2 * (5 * 5 + 7 * 7) * (4 + 4)


def test_a_band_has_the_pairs_that_the_reference_sees():
    for rows, columns, left, right in itertools.product(
        range(5), range(5), range(-1, 5), range(-1, 5)
    ):
        seen = visible_pairs(rows, columns, left, right, torch.device("cpu"))
        assert band(rows, columns, left, right) == seen.sum()


def test_the_counter_is_found_in_either_order_of_imports():
    count = (
        "q = torch.randn(1, 8, 2, 4)\n"
        "with FlopCounterMode(display=False) as counter: tm.attention(q, q, q)\n"
        "assert counter.get_total_flops() == 2048"
    )
    counter = "from torch.utils.flop_counter import FlopCounterMode"
    package = "import torch, sys, tokenmill as tm; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"{package}\n{counter}\n{count}"], check=True)
