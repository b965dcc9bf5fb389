"""titans_memory and nn.TitansMemory against the equations of Titans."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from literal import assert_reads_as, randomised
from tensors import KERNELS, assert_keeps_budget, close, draw, every_backend
from titans_literal import Memory, linear, of_heads

import tokenmill as tm
from tokenmill import nn

# A memory of several matrices uses PyTorch's own operations on every backend.
DEPTHS = pytest.mark.parametrize(
    ("depth", "backend"), [(1, b) for b in KERNELS] + [(2, "reference")]
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"]
)


def literal(chunk):
    def run(q, k, v, *gates):
        alpha, eta, theta = (0.2 * torch.sigmoid(g) for g in gates)
        memory = [q.new_zeros(q.shape[2], q.shape[3], v.shape[3])]
        return of_heads(q, k, v, alpha, eta, theta, memory, linear, chunk)

    return run


def ours(chunk, backend=None):
    def run(q, k, v, *gates):
        alpha, eta, theta = (0.2 * torch.sigmoid(g) for g in gates)
        return tm.titans_memory(
            q, k, v, alpha=alpha, eta=eta, theta=theta, chunk_size=chunk, backend=backend
        )

    return run


@pytest.mark.parametrize("chunk", [1, 8, 64], ids=["each token", "chunks", "default"])
def test_the_reference_computes_the_equations(chunk):
    """Chunks of one token give the recurrence of section 3.1, longer chunks the one of 3.2."""
    length = 70 if chunk == 64 else 20
    q, k, v, *gates = draw(
        "cpu", *[(1, length, 2, 4)] * 2, (1, length, 2, 3), *[(1, length, 2)] * 3,
        dtype=torch.float64,
    )  # fmt: skip
    found, wanted = (make(chunk)(q, k, v, *gates) for make in (ours, literal))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(wanted)
    inputs = (q, k, v, *gates)
    grads = [torch.autograd.grad(y, inputs, weight) for y in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_backend
@DTYPES
@pytest.mark.parametrize("chunk", [1, 5], ids=["each token", "chunks"])
def test_results_and_gradients_keep_the_error_budget(chunk, dtype, backend):
    q, k, v, *gates = draw(backend, *[(1, 12, 2, 8)] * 3, *[(1, 12, 2)] * 3, dtype=dtype)
    with torch.no_grad():
        for t in (q, k, v):
            t.div_(8**0.5)
    assert_keeps_budget(ours(chunk, backend), literal(chunk), [q, k, v, *gates])


@every_backend
def test_chunks_of_64_tokens(backend):
    inputs = draw(backend, *[(1, 70, 1, 8)] * 3, *[(1, 70, 1)] * 3)
    with torch.no_grad():
        for t in inputs[:3]:
            t.div_(8**0.5)
    assert_keeps_budget(ours(64, backend), literal(64), inputs)


def module_by_hand(layer):
    def run(weights, x):
        memory = Memory(layer, weights)
        return memory.learn(x, memory.begin(len(x)))[0]

    return run


@DEPTHS
def test_the_layer(depth, backend):
    torch.manual_seed(0)
    layer = nn.TitansMemory(8, 2, depth=depth, expansion=2, chunk_size=4, backend=backend)
    x = torch.randn(1, 6, 8, requires_grad=True)
    assert_reads_as(randomised(layer), module_by_hand(layer), x, backend=backend, tolerance=2e-4)


@DEPTHS
def test_a_sequence_in_pieces(depth, backend):
    """Results, recollections and gradients through the state equal a single call."""
    torch.manual_seed(0)
    layer = nn.TitansMemory(8, 2, depth=depth, expansion=2, chunk_size=2, backend=backend)
    layer = randomised(layer).to(device_of(backend))
    x = torch.randn(2, 11, 8, device=device_of(backend), requires_grad=True)
    state, parts = None, []
    for part in x.split([4, 6, 1], 1):
        y, state = layer(part, state, return_state=True)
        parts.append(y)
    whole, last = layer(x, return_state=True)
    close(torch.cat(parts, 1), whole)
    close(layer.recall(x, state), layer.recall(x, last))
    wanted = torch.autograd.grad(whole.square().sum(), x, retain_graph=True)
    found = torch.autograd.grad(torch.cat(parts, 1).square().sum(), x)
    close(found[0], wanted[0], 1e-4)


@DEPTHS
def test_what_a_memory_recalls(depth, backend):
    torch.manual_seed(0)
    layer = nn.TitansMemory(8, 2, depth=depth, expansion=2, chunk_size=4, backend=backend)
    layer = randomised(layer).to(device_of(backend))
    x = torch.randn(2, 6, 8, device=device_of(backend))
    literal = Memory(layer.cpu(), {n: w.detach().double() for n, w in layer.named_parameters()})
    layer.to(device_of(backend))
    begun = literal.begin(2)
    close(layer.recall(x).cpu(), literal.recall(x.cpu().double(), begun), 1e-4)
    _, state = layer(x, return_state=True)
    _, learned = literal.learn(x.cpu().double(), begun)
    close(
        layer.recall(x[:, :3], state).cpu(), literal.recall(x[:, :3].cpu().double(), learned), 1e-4
    )


def test_a_memory_of_three_matrices():
    torch.manual_seed(0)
    layer = randomised(nn.TitansMemory(8, 2, depth=3, expansion=2, chunk_size=4))
    x = torch.randn(1, 5, 8, requires_grad=True)
    assert_reads_as(layer, module_by_hand(layer), x, backend="cpu", tolerance=2e-4)


@every_backend
def test_the_layer_at_its_defaults(backend):
    torch.manual_seed(0)
    layer = nn.TitansMemory(16, 2, backend=backend)
    assert (layer.chunk_size, layer.conv.shape[0], len(layer.memory)) == (64, 4, 1)
    assert layer.max_step == 2 / 8 and not layer.memory[0].any()
    x = torch.randn(1, 66, 16, requires_grad=True)
    assert_reads_as(layer, module_by_hand(layer), x, backend=backend, tolerance=2e-4)


@every_backend
def test_the_memory_forgets_nothing_but_what_its_gate_says(backend):
    """A pair of key and value that was written is recalled many tokens later."""
    device = device_of(backend)
    q = F.normalize(torch.randn(1, 300, 1, 16, device=device), dim=-1)
    v, gates = torch.randn(1, 300, 1, 8, device=device), torch.zeros(3, 1, 300, 1, device=device)
    gates[2, :, 5] = 1  # a step for token 5 only
    q[:, 299] = q[:, 5]
    alpha, eta, theta = gates
    out = tm.titans_memory(q, q, v, alpha=alpha, eta=eta, theta=theta, backend=backend)
    torch.testing.assert_close(out[:, 299], v[:, 5])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": 0}, "depth: must be 1 to 64; got 0"),
        ({"num_heads": 3}, "num_heads: must divide dim, 16, .*; got 3"),
        ({"chunk_size": 0}, "chunk_size: must be at least 1; got 0"),
        ({"max_step": "1"}, "max_step: must be a number; got '1'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(RuntimeError, match=f"^tokenmill.nn.TitansMemory: {says}$"):
        nn.TitansMemory(**{"dim": 16, "num_heads": 2, **options})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda state: (), r"must be a TitansState; got \[\]"),
        (lambda state: state._replace(memory=()), "must have 1 tensors of memory; got 0"),
        (
            lambda state: state._replace(tail=torch.zeros(2, 3, 40)),
            r"must have tail of shape \[2, 3, 48\]; got \[2, 3, 40\]",
        ),
    ],
)
def test_bad_states(edit, says):
    layer, x = nn.TitansMemory(16, 2), torch.zeros(2, 3, 16)
    state = edit(layer(x, return_state=True)[1])
    with pytest.raises(RuntimeError, match=f"^tokenmill.nn.TitansMemory: state: {says}$"):
        layer(x, state)


def test_bad_input():
    with pytest.raises(RuntimeError, match=r"x: must have shape \[B, N, 16\]; got \[2, 16\]"):
        nn.TitansMemory(16, 2)(torch.zeros(2, 16))
