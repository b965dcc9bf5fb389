"""titans_memory and nn.TitansMemory against the equations of Titans."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from literal import assert_reads_as, randomised
from tensors import assert_keeps_budget, draw

import tokenmill as tm
from tokenmill import nn


def by_hand(q, k, v, alpha, eta, theta, memory, recall, chunk):
    """Equations of sections 3.1 and 3.2 for one sequence and head: y_t = M_t(q_t), where M is what
    recall makes of the tensors in memory, and the surprise of a token is the gradient of the loss
    |M(k) - v|^2 at the memory before its chunk."""
    momentum = [torch.zeros_like(m) for m in memory]
    outs = []
    for t in range(len(q)):
        if t % chunk == 0:
            before = memory
        with torch.enable_grad():
            leaves = [m if m.requires_grad else m.clone().requires_grad_() for m in before]
            loss = (recall(leaves, k[t]) - v[t]).square().sum()
            surprise = torch.autograd.grad(loss, leaves, create_graph=True)
        momentum = [eta[t] * s - theta[t] * g for s, g in zip(momentum, surprise, strict=True)]
        memory = [(1 - alpha[t]) * m + s for m, s in zip(memory, momentum, strict=True)]
        outs.append(recall(memory, q[t]))
    return torch.stack(outs)


def linear(memory, x):
    return x @ memory[0]


def of_heads(q, k, v, alpha, eta, theta, memory, recall, chunk):
    """by_hand for [B, S, H, ...] and memories [H, in, out], of a theta for half of the loss."""
    batch, _, heads, _ = q.shape
    rows = [
        torch.stack([
            by_hand(
                *(t[b, :, h] for t in (q, k, v, alpha, eta, theta / 2)), [m[h] for m in memory],
                recall, chunk,
            )
            for h in range(heads)
        ], 1)
        for b in range(batch)
    ]  # fmt: skip
    return torch.stack(rows)


def literal(chunk):
    def run(q, k, v, *gates):
        alpha, eta, theta = (0.2 * torch.sigmoid(g) for g in gates)
        memory = [q.new_zeros(q.shape[2], q.shape[3], v.shape[3])]
        return of_heads(q, k, v, alpha, eta, theta, memory, linear, chunk)

    return run


def ours(chunk):
    def run(q, k, v, *gates):
        alpha, eta, theta = (0.2 * torch.sigmoid(g) for g in gates)
        return tm.titans_memory(q, k, v, alpha=alpha, eta=eta, theta=theta, chunk_size=chunk)

    return run


@pytest.mark.parametrize("chunk", [1, 8, 64], ids=["each token", "chunks", "default"])
def test_results_and_gradients(chunk):
    """With chunks of one token the recurrence of section 3.1, with others that of 3.2."""
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


def test_the_error_budget():
    inputs = draw("cpu", *[(1, 40, 1, 8)] * 3, *[(1, 40, 1)] * 3)
    with torch.no_grad():
        for t in inputs[:3]:
            t.div_(8**0.5)
    assert_keeps_budget(ours(16), literal(16), inputs)


def module_by_hand(layer, activation=F.gelu):
    heads, dim, chunk, step = layer.num_heads, layer.head_dim, layer.chunk_size, layer.max_step

    def recall(memory, x):
        for i, matrix in enumerate(memory):
            x = (activation(x) if i else x) @ matrix
        return x

    def run(weights, x):
        projected = x @ weights["qkv_proj.weight"].T
        conv = weights["conv"]
        seen = [
            sum(conv[-1 - back] * projected[:, t - back] for back in range(min(len(conv), t + 1)))
            for t in range(x.shape[1])
        ]
        q, k, v = F.silu(torch.stack(seen, 1)).unflatten(-1, (3, heads, dim)).unbind(2)
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        gates = torch.sigmoid(x @ weights["gates.weight"].T + weights["gates.bias"])
        alpha, eta, theta = gates.unflatten(-1, (3, heads)).unbind(2)
        memory = [weights[f"memory.{i}"] for i in range(len(layer.memory))]
        y = of_heads(q, k, v, alpha, eta, step * theta, memory, recall, chunk)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["norm.weight"]
        gate = torch.sigmoid(x @ weights["output_gate.weight"].T)
        return (gate * y.flatten(2)) @ weights["out_proj.weight"].T

    return run


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_layer(depth):
    torch.manual_seed(0)
    layer = randomised(nn.TitansMemory(8, 2, depth=depth, expansion=2, chunk_size=4))
    x = torch.randn(2, 7, 8, requires_grad=True)
    assert_reads_as(layer, module_by_hand(layer), x, backend="cpu", tolerance=2e-4)


def test_the_layer_at_its_defaults():
    torch.manual_seed(0)
    layer = nn.TitansMemory(16, 2)
    assert (layer.chunk_size, layer.conv.shape[0], len(layer.memory)) == (64, 4, 1)
    assert layer.max_step == 2 / 8 and not layer.memory[0].any()
    x = torch.randn(1, 66, 16, requires_grad=True)
    assert_reads_as(layer, module_by_hand(layer), x, backend="cpu", tolerance=2e-4)


def test_the_layer_forgets_nothing_but_what_its_gate_says():
    """A pair of key and value that was written is read many tokens later."""
    q = F.normalize(torch.randn(1, 300, 1, 16), dim=-1)
    v, gates = torch.randn(1, 300, 1, 8), torch.zeros(3, 1, 300, 1)
    gates[2, :, 5] = 1  # a step for token 5 alone
    q[:, 299] = q[:, 5]
    alpha, eta, theta = gates
    out = tm.titans_memory(q, q, v, alpha=alpha, eta=eta, theta=theta)
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


def test_bad_input():
    with pytest.raises(RuntimeError, match=r"x: must have shape \[B, N, 16\]; got \[2, 16\]"):
        nn.TitansMemory(16, 2)(torch.zeros(2, 16))
