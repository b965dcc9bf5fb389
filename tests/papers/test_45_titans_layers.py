"""Memory as context, as gate and as layer against the equations of Titans, sections 4.1 to 4.3."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from literal import assert_reads_as, randomised
from tensors import close, every_backend
from titans_literal import Memory, rms

from tokenmill import nn

DIM, HEADS, SEGMENT, WINDOW = 8, 2, 4, 3


def memory(depth, backend):
    return nn.TitansMemory(DIM, HEADS, depth=depth, expansion=2, chunk_size=3, backend=backend)


MAKE = {
    "context": lambda m, backend: nn.TitansMAC(
        DIM, HEADS, segment=SEGMENT, persistent=2, memory=m, backend=backend
    ),
    "context, whole segments": lambda m, backend: nn.TitansMAC(
        DIM, HEADS, segment=SEGMENT, persistent=2, retrieved="segment", memory=m, backend=backend
    ),
    "gate": lambda m, backend: nn.TitansMAG(
        DIM, HEADS, window=WINDOW, persistent=2, memory=m, backend=backend
    ),
    "layer": lambda m, backend: nn.TitansMAL(
        DIM, HEADS, window=WINDOW, persistent=2, memory=m, backend=backend
    ),
}


def attended(w, queries, seen):
    """Softmax attention of tokens [B, n, C], token i to seen[i], [B, m, C]; each head
    separately."""
    inner = w["qkv_proj.weight"].shape[0] // 3
    w_q, w_k, w_v = w["qkv_proj.weight"].split(inner)
    rows = []
    for i, keys in enumerate(seen):
        q, k, v = (
            (t @ part.T).unflatten(-1, (HEADS, -1))
            for t, part in ((queries[:, i], w_q), (keys, w_k), (keys, w_v))
        )
        z = torch.einsum("bhd,bmhd->bhm", q, k) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("bhm,bmhd->bhd", z.softmax(-1), v).flatten(1))
    return torch.stack(rows, 1) @ w["out_proj.weight"].T


def product(w, a, b):
    """Section 4.2: both sides normed with learned vectors, a nonlinearity, the product."""
    return rms(a, w["norm.weight"]) * torch.sigmoid(rms(b, w["gate_norm.weight"]))


def as_context(layer):
    def run(w, x):
        memory, outs = Memory(layer.memory, w, "memory."), []
        state = memory.begin(len(x))
        first = w["persistent"].expand(len(x), -1, -1)
        for part in x.split(SEGMENT, 1):
            h = memory.recall(part, state)  # equation 21
            n = part.shape[1]
            seen = [  # 22
                torch.cat(
                    [first, h if layer.retrieved == "segment" else h[:, : i + 1], part[:, : i + 1]],
                    1,
                )
                for i in range(n)
            ]
            y = attended(w, part, seen)  # 23
            learned, state = memory.learn(y, state)  # 24
            outs.append(product(w, y, learned))  # 25
        return torch.cat(outs, 1)

    return run


def as_gate(layer):
    def run(w, x):
        memory = Memory(layer.memory, w, "memory.")
        first = w["persistent"].expand(len(x), -1, -1)
        whole = torch.cat([first, x], 1)  # equation 26
        seen = [
            torch.cat([first, x[:, max(i + 1 - WINDOW, 0) : i + 1]], 1) for i in range(x.shape[1])
        ]
        y = attended(w, x, seen)  # 27
        learned, _ = memory.learn(whole, memory.begin(len(x)))
        return product(w, y, learned[:, first.shape[1] :])  # 28

    return run


def as_layer(layer):
    def run(w, x):
        memory = Memory(layer.memory, w, "memory.")
        first = w["persistent"].expand(len(x), -1, -1)
        y, _ = memory.learn(torch.cat([first, x], 1), memory.begin(len(x)))  # equations 29, 30
        p = first.shape[1]
        seen = [y[:, max(p + i + 1 - WINDOW, 0) : p + i + 1] for i in range(x.shape[1])]
        return attended(w, y[:, p:], seen)  # 31

    return run


LITERAL = {
    "context": as_context,
    "context, whole segments": as_context,
    "gate": as_gate,
    "layer": as_layer,
}
each_kind = pytest.mark.parametrize("kind", MAKE)


def made(kind, backend, depth=1):
    torch.manual_seed(0)
    return randomised(MAKE[kind](memory(depth, backend), backend))


@every_backend
@each_kind
def test_the_equations(kind, backend):
    layer = made(kind, backend)
    x = torch.randn(1, 6, DIM, requires_grad=True)
    assert_reads_as(layer, LITERAL[kind](layer), x, backend=backend, tolerance=3e-4)


@each_kind
def test_a_deep_memory(kind):
    layer = made(kind, "reference", depth=2)
    x = torch.randn(1, 5, DIM, requires_grad=True)
    assert_reads_as(layer, LITERAL[kind](layer), x, backend="reference", tolerance=3e-4)


@every_backend
@each_kind
def test_a_sequence_in_pieces(kind, backend):
    """Pieces are whole segments, or end with a chunk of the memory: 2 persistent tokens and 4, then
    6, then 2."""
    layer = made(kind, backend).to(device_of(backend))
    x = torch.randn(2, 12, DIM, device=device_of(backend))
    pieces = [4, 8] if "context" in kind else [4, 6, 2]
    state, parts = None, []
    with torch.no_grad():
        for part in x.split(pieces, 1):
            y, state = layer(part, state, return_state=True)
            parts.append(y)
        close(torch.cat(parts, 1), layer(x), 1e-4)


@every_backend
@pytest.mark.parametrize("kind", ["gate", "layer"])
def test_token_by_token(kind, backend):
    """The memory has chunks of one token."""
    torch.manual_seed(0)
    tokens = nn.TitansMemory(DIM, HEADS, chunk_size=1, backend=backend)
    layer = randomised(MAKE[kind](tokens, backend)).to(device_of(backend))
    x = torch.randn(2, 7, DIM, device=device_of(backend))
    state, parts = None, []
    with torch.no_grad():
        for part in x.split([2, 1, 1, 1, 1, 1], 1):
            y, state = layer(part, state, return_state=True)
            parts.append(y)
        assert state.k.shape[1] == WINDOW - 1
        close(torch.cat(parts, 1), layer(x), 1e-4)


@each_kind
def test_no_token_depends_on_a_later_one(kind):
    """The only exception: tokens of a segment that retrieves from memory as a whole."""
    layer = made(kind, None)
    x = torch.randn(1, 9, DIM, requires_grad=True)
    (seen,) = torch.autograd.grad(layer(x)[:, 5].sum(), x)
    reached = seen[0].abs().sum(1) > 0
    wanted = [True] * 6 + [kind == "context, whole segments"] * 2 + [False]
    if kind == "layer":
        wanted[:3] = reached[:3].tolist()  # beyond the window, through the memory only
    assert reached.tolist() == wanted


def test_what_a_segment_forgets_is_in_the_memory():
    """Attention of a segment does not see earlier segments: with a memory that learns nothing and
    convolves nothing, its results do not depend on them."""
    layer = made("context", None)
    x = torch.randn(1, 2 * SEGMENT, DIM)
    other = torch.cat([torch.randn(1, SEGMENT, DIM), x[:, SEGMENT:]], 1)
    with torch.no_grad():
        apart = (layer(x) - layer(other))[:, SEGMENT:]
        assert (apart.norm(dim=-1) > 1e-4).all()
        layer.memory.gates.weight[-HEADS:] = 0
        layer.memory.gates.bias[-HEADS:] = -1e4  # theta 0
        layer.memory.gates.weight[:HEADS] = 0
        layer.memory.gates.bias[:HEADS] = -1e4  # alpha 0
        layer.memory.conv[:-1] = 0
        close(layer(x)[:, SEGMENT:], layer(other)[:, SEGMENT:], 1e-6)


@pytest.mark.parametrize("kind", [nn.TitansMAC, nn.TitansMAG, nn.TitansMAL])
def test_the_defaults(kind):
    layer = kind(16, 2)
    assert layer.persistent.shape == (4, 16) and layer.memory.head_dim == 8
    assert getattr(layer, "segment", 128) == getattr(layer, "window", 128) == 128


@pytest.mark.parametrize("kind", [nn.TitansMAC, nn.TitansMAG, nn.TitansMAL])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"persistent": -1}, r"persistent: must be 0 to 2\^20 - 1; got -1"),
        ({"num_heads": 3}, "num_heads: must divide dim, 16, .*; got 3"),
        ({"memory": torch.nn.Linear(16, 16)}, "memory: must be a TitansMemory or None; got .*"),
        ({"memory": nn.TitansMemory(8, 2)}, "memory: must have 16 channels; got 8"),
    ],
)
def test_bad_options(kind, options, says):
    with pytest.raises(RuntimeError, match=f"^tokenmill.nn.{kind.__name__}: {says}$"):
        kind(**{"dim": 16, "num_heads": 2, **options})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nn.TitansMAC(16, 2, segment=0), r"MAC: segment: must be 1 to 2\^20 - 1; got 0"),
        (
            lambda: nn.TitansMAC(16, 2, retrieved="all"),
            "MAC: retrieved: must be 'past' or 'segment'; got 'all'",
        ),
        (lambda: nn.TitansMAG(16, 2, window=0), r"MAG: window: must be 1 to 2\^31 - 1; got 0"),
        (
            lambda: nn.TitansMAL(16, 2)(torch.zeros(2, 16)),
            r"MAL: x: must have shape \[B, N, 16\]; got \[2, 16\]",
        ),
        (
            lambda: nn.TitansMAG(16, 2)(torch.zeros(2, 3, 16), ()),
            r"MAG: state: must be a TitansLayerState; got \[\]",
        ),
    ],
)
def test_bad_calls(call, says):
    with pytest.raises(RuntimeError, match=f"^tokenmill.nn.Titans{says}$"):
        call()
