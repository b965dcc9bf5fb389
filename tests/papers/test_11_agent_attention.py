"""AgentAttention against a literal reading of the released layers of Agent Attention (Han et al.
2024; LeapLabTHU/Agent-Attention at 207ce3e, agent_transformer/models): DeiT has a class token; PVT,
Swin and CSWin compute the same on maps without one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from literal import assert_reads_as, randomised
from tensors import each_backend, every_backend

import tokenmill as tm


def agent_attention(w, x, agents=None, *, heads, grid, cells, class_token):
    """Computes one picture and one head after the other, with the matrices of weights."""
    first, out = int(class_token), []
    stretched = {}
    for name in ("an_bias", "na_bias"):  # [H, n, 7, 7] to [H, n, N]
        stretched[name] = F.interpolate(w[name], grid, mode="bilinear").flatten(2)
    for b in range(x.shape[0]):
        q, k, v = (x[b] @ w["qkv.weight"].T + w.get("qkv.bias", 0)).chunk(3, 1)
        if agents is None:
            means = []
            for i in range(cells[0]):
                for j in range(cells[1]):
                    rows = slice(i * grid[0] // cells[0], -(-(i + 1) * grid[0] // cells[0]))
                    columns = slice(j * grid[1] // cells[1], -(-(j + 1) * grid[1] // cells[1]))
                    inside = q[first:].unflatten(0, grid)[rows, columns]
                    means.append(inside.flatten(0, 1).mean(0))
            a = torch.stack(means)
        else:
            a = agents[b]
        parts = []
        for h, (qh, kh, vh, ah) in enumerate(
            zip(*(t.chunk(heads, 1) for t in (q, k, v, a)), strict=True)
        ):
            b1 = stretched["an_bias"][h] + (w["ah_bias"] + w["aw_bias"])[0, h].flatten(1)
            b2 = stretched["na_bias"][h].T + (w["ha_bias"] + w["wa_bias"])[0, h].flatten(0, 1)
            if class_token:
                b1 = torch.cat([w["ac_bias"][0, h], b1], 1)
                b2 = torch.cat([w["ca_bias"][0, h], b2], 0)
            scale = qh.shape[1] ** -0.5
            gathered = torch.softmax(ah @ kh.T * scale + b1, 1) @ vh
            parts.append(torch.softmax(qh @ ah.T * scale + b2, 1) @ gathered)
        y = torch.cat(parts, 1)
        maps = v[first:].T.unflatten(1, grid)[None]
        local = F.conv2d(maps, w["dwc.weight"], w["dwc.bias"], padding=1, groups=maps.shape[1])
        y = y + F.pad(local[0].flatten(1).T, (0, 0, first, 0))
        out.append(y @ w["proj.weight"].T + w["proj.bias"])
    return torch.stack(out)


def reading(layer):
    def literal(w, x, agents=None):
        return agent_attention(w, x, agents, heads=layer.num_heads, grid=layer.grid,
                               cells=layer.agents, class_token=layer.class_token)  # fmt: skip

    return literal


@each_backend
@pytest.mark.parametrize(
    ("batch", "dim", "heads", "grid", "agents", "class_token"),
    [
        (1, 48, 3, 14, 7, True),  # defaults of the DeiT models, with a class token
        (2, 16, 2, (5, 3), (2, 4), False),  # more agent columns than token columns
        (2, 6, 1, (1, 9), 1, True),
        (0, 6, 1, 3, 2, True),
    ],
)
def test_the_equations(batch, dim, heads, grid, agents, class_token, backend):
    layer = tm.nn.AgentAttention(dim, heads, grid, agents, class_token=class_token,
                                 qkv_bias=True, backend=backend)  # fmt: skip
    tokens = class_token + layer.grid[0] * layer.grid[1]
    x = torch.randn(batch, tokens, dim, requires_grad=True)
    if batch == 0:
        assert layer(x.to(layer.proj.weight)).shape == x.shape
        return
    assert_reads_as(randomised(layer), reading(layer), x, backend=backend)


@every_backend
def test_given_agents(backend):
    layer = tm.nn.AgentAttention(8, 2, (3, 4), (1, 5), backend=backend)
    x, agents = (torch.randn(2, n, 8, requires_grad=True) for n in (12, 5))
    assert_reads_as(randomised(layer), reading(layer), x, agents, backend=backend)


def test_no_bias_is_expanded_over_the_batch():
    layer = tm.nn.AgentAttention(16, 2, (2, 3), 2)
    gather, ask = layer._biases()
    assert gather.shape == (1, 2, 4, 6) and ask.shape == (1, 2, 6, 4)


def test_published_names_load():
    """Shapes and names of the DeiT layers match their state dicts."""
    layer = tm.nn.AgentAttention(24, 3, class_token=True, qkv_bias=True)
    n, h = 49, 3
    shapes = {
        "an_bias": (h, n, 7, 7), "na_bias": (h, n, 7, 7), "ah_bias": (1, h, n, 14, 1),
        "aw_bias": (1, h, n, 1, 14), "ha_bias": (1, h, 14, 1, n), "wa_bias": (1, h, 1, 14, n),
        "ac_bias": (1, h, n, 1), "ca_bias": (1, h, 1, n), "qkv.weight": (72, 24),
        "qkv.bias": (72,), "proj.weight": (24, 24), "proj.bias": (24,),
        "dwc.weight": (24, 1, 3, 3), "dwc.bias": (24,),
    }  # fmt: skip
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == shapes


def published(kind, heads, dim, side, number, class_token):
    """Names and shapes of a layer in the state dicts of the released models."""
    inside = "attns.0." if kind == "cswin" else ""
    local = inside + ("get_v" if kind == "cswin" else "dwc")
    shapes = {
        f"{inside}an_bias": (heads, number, 7, 7), f"{inside}na_bias": (heads, number, 7, 7),
        f"{inside}ah_bias": (1, heads, number, side, 1),
        f"{inside}aw_bias": (1, heads, number, 1, side),
        f"{inside}ha_bias": (1, heads, side, 1, number),
        f"{inside}wa_bias": (1, heads, 1, side, number),
        f"{local}.weight": (dim, 1, 3, 3), f"{local}.bias": (dim,),
        "proj.weight": (dim, dim), "proj.bias": (dim,),
    }  # fmt: skip
    if class_token:
        shapes |= {"ac_bias": (1, heads, number, 1), "ca_bias": (1, heads, 1, number)}
    projections = {"q": dim, "kv": 2 * dim} if kind == "pvt" else {"qkv": 3 * dim}
    for name, rows in projections.items():
        shapes |= {f"{name}.weight": (rows, dim), f"{name}.bias": (rows,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("kind", "heads", "side", "agents"),
    [("deit", 3, 14, 9), ("pvt", 1, 56, 3), ("swin", 2, 28, 4), ("cswin", 2, 28, 4)],
)
@torch.no_grad()
def test_released_layers_load_and_give_their_results(kind, heads, side, agents):
    """Agents and grids of agent_deit_b, and of the first or second stage of the other models."""
    dim, class_token = 12, kind == "deit"
    state = published(kind, heads, dim, side, agents**2, class_token)
    model = torch.nn.Sequential(
        tm.nn.AgentAttention(dim, heads, side, agents, class_token=class_token, qkv_bias=True)
    )
    model.load_state_dict({f"0.{name}": t for name, t in state.items()})
    w = {name.removeprefix("attns.0."): t.double() for name, t in state.items()}
    if kind == "pvt":
        for part in ("weight", "bias"):
            w[f"qkv.{part}"] = torch.cat([w.pop(f"q.{part}"), w.pop(f"kv.{part}")])
    if kind == "cswin":
        w |= {f"dwc.{part}": w.pop(f"get_v.{part}") for part in ("weight", "bias")}
    x = torch.randn(1, class_token + side**2, dim)
    want = agent_attention(w, x.double(), heads=heads, grid=(side, side), cells=(agents, agents),
                           class_token=class_token)  # fmt: skip
    torch.testing.assert_close(model(x).double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.AgentAttention(8, 3), "num_heads: must divide dim, 8; got 3"),
        (lambda: tm.nn.AgentAttention(8, 2, (1, 2, 3)), "grid: must be an integer or a pair"),
        (lambda: tm.nn.AgentAttention(8, 2, agents=0), "agents: must be an integer or a pair"),
        (lambda: tm.nn.AgentAttention(8, 2, 3)(torch.zeros(1, 10, 8)),
         r"x: must have shape \[B, 9, 8\]; got \[1, 10, 8\]"),
        (lambda: tm.nn.AgentAttention(8, 2, 3, 2)(torch.zeros(1, 9, 8), torch.zeros(1, 3, 8)),
         r"agents: must have shape \[1, 4, 8\]; got \[1, 3, 8\]"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.AgentAttention: {error}"):
        call()
