"""The attention and the loss of CACE against the released code: bang123-box/CFE at 0f2ea6f,
strhub/models/cfe/modules.py (AttnMixer with local_type r2, and Intra_Inter_ConsistencyLoss)."""

from __future__ import annotations

import math

import pytest
import torch
from literal import assert_reads_as, randomised
from tensors import close, every_backend

from tokenmill import nn

GRID, HEADS, DIM = (2, 5), 2, 8


def mixed(decay, rotary, distance):
    def literal(w, x):
        q, k, v = (x @ w["qkv.weight"].T).unflatten(-1, (3, HEADS, -1)).unbind(2)
        half = q.shape[-1] // 2
        angles = [10000.0 ** (-i / (half - 1)) for i in range(half)]  # both ends included
        rows = []
        for i in range(x.shape[1]):
            z, fade = [], []
            for j in range(x.shape[1]):
                product = 0
                for c, angle in enumerate(angles):  # pairs of adjacent channels
                    a, b = q[:, i, :, 2 * c], q[:, i, :, 2 * c + 1]
                    d, e = k[:, j, :, 2 * c], k[:, j, :, 2 * c + 1]
                    turn = (i - j) * angle if rotary else 0.0
                    product = product + (a * d + b * e) * math.cos(turn)
                    product = product + (a * e - b * d) * math.sin(turn)
                z.append(product / math.sqrt(2 * half))
                apart = [abs(i // GRID[1] - j // GRID[1]), abs(i % GRID[1] - j % GRID[1])]
                far = max(apart) if distance == "chebyshev" else sum(apart)
                fade.append([(1 - 2 ** (-5 - h)) ** far if decay else 1.0 for h in range(HEADS)])
            p = torch.stack(z, -1).softmax(-1) * torch.tensor(fade, dtype=x.dtype).T
            rows.append(torch.einsum("bhj,bjhd->bhd", p, v).flatten(1))
        return torch.stack(rows, 1) @ w["proj.weight"].T + w["proj.bias"]

    return literal


@every_backend
@pytest.mark.parametrize(
    ("decay", "rotary", "distance"),
    [(True, True, "chebyshev"), (False, True, "chebyshev"), (True, False, "manhattan")],
)
def test_the_mixer(decay, rotary, distance, backend):
    layer = nn.CharacterAttention(
        DIM, HEADS, GRID, decay=decay, rotary=rotary, distance=distance, backend=backend
    )
    x = torch.randn(2, 10, DIM, requires_grad=True)
    literal = mixed(decay, rotary, distance)
    assert_reads_as(randomised(layer), literal, x, backend=backend, tolerance=1e-4)


def consistency(w, features, targets):
    """Loss over characters of all texts: half of 0.2 times the sum of ratios."""
    total = 0
    for text, classes in zip(features, targets.tolist(), strict=True):
        for x, own in zip(text, classes, strict=True):
            if own < 0:
                continue
            apart = (x - w["centers"]).square().sum(1)
            others = sum(apart[c] for c in range(len(apart)) if c != own)
            total = total + apart[own] / (others + 1)
    return 0.2 * total / 2


def test_the_loss():
    loss = randomised(nn.CharacterConsistencyLoss(7, 6))
    features = torch.randn(3, 5, 6, requires_grad=True)
    targets = torch.tensor([[0, 6, 3, -1, -1], [2, 2, 2, 1, 5], [-1, -1, -1, -1, -1]])
    assert_reads_as(loss, consistency, features, targets, backend="reference")
    both = loss(features, targets), loss(features, targets.int())
    assert torch.equal(*both)
    assert loss(features[:0], targets[:0]) == 0


def test_the_centers_are_a_memory_that_outlives_batches():
    """Training steps move a center towards the features of its class."""
    torch.manual_seed(0)
    loss = nn.CharacterConsistencyLoss(4, 3, weight=1.0)
    goal = 2 * torch.nn.functional.one_hot(torch.arange(4) % 3, 3).float()
    goal[3] *= -1
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for step in range(300):
        targets = torch.tensor([step % 4, (step + 1) % 4])  # half of the classes per batch
        optimizer.zero_grad()
        loss(goal[targets], targets).backward()
        optimizer.step()
    close(loss.centers.detach(), goal, 0.1)


def test_16_bits_and_autocast_compute_in_float32():
    loss = nn.CharacterConsistencyLoss(4, 32)
    features, targets = torch.randn(6, 32), torch.arange(6) % 4
    wanted = loss(features, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(features, targets), wanted)
    half = loss.half()(features.half(), targets)
    assert half.dtype == torch.float32 and abs(half - wanted) < 1e-3 * wanted


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: nn.CharacterAttention(8, 2, (2, 3))(torch.zeros(1, 5, 8)),
            r"Attention: x: must have shape \[B, 6, 8\]; got \[1, 5, 8\]",
        ),
        (lambda: nn.CharacterAttention(8, 2, 6), r"Attention: grid: must be \(rows, columns\); .*"),
        (
            lambda: nn.CharacterAttention(6, 2),
            "Attention: rotary: must be False with an odd head_dim; got True",
        ),
        (
            lambda: nn.CharacterConsistencyLoss(4, 3)(torch.zeros(2, 3), torch.tensor([0, 4])),
            "ConsistencyLoss: targets: must be below 4; got 4",
        ),
        (
            lambda: nn.CharacterConsistencyLoss(4, 3)(torch.zeros(2, 3), torch.zeros(2)),
            "ConsistencyLoss: targets: must be int32 or int64; got float32",
        ),
        (
            lambda: nn.CharacterConsistencyLoss(4, 3)(torch.zeros(2, 3), torch.tensor([0])),
            r"ConsistencyLoss: targets: must have shape \[2\]; got \[1\]",
        ),
        (
            lambda: nn.CharacterConsistencyLoss(0, 3),
            r"ConsistencyLoss: num_classes: must be 1 to 2\^31 - 1; got 0",
        ),
    ],
)
def test_bad_calls(call, says):
    with pytest.raises(RuntimeError, match=f"^tokenmill.nn.Character{says}$"):
        call()
