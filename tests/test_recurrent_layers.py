"""nn.GatedDeltaNet, nn.KimiDeltaAttention and nn.Mamba2 against the layers of transformers.

The layers of transformers 5.24 and later, in plain PyTorch, are the oracle: Qwen3Next, Qwen3.5,
Kimi Linear, Mamba-2 and Zamba2, on weights that are loaded unchanged.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from tokenmill import nn

OWN = {
    "qwen3_next": lambda **o: nn.GatedDeltaNet(24, 2, 4, 8, 12, **o),
    "qwen3_5": lambda **o: nn.GatedDeltaNet(24, 2, head_dim=8, conv_kernel=3, **o),
    "kimi_linear": lambda **o: nn.KimiDeltaAttention(24, 2, 8, **o),
    "mamba2": lambda **o: nn.Mamba2(24, head_dim=8, state_size=12, n_groups=2, **o),
    "zamba2": lambda **o: nn.Mamba2(
        24, head_dim=8, state_size=8, bias=True, time_step_limit=(0.01, float("inf")), **o
    ),
}
RULE = {
    "linear_key_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "hidden_size": 24, "num_hidden_layers": 1, "layer_types": ["linear_attention"],
}  # fmt: skip
THEIRS = {
    "qwen3_next": ("Qwen3NextGatedDeltaNet", "Qwen3NextConfig",
                   {**RULE, "linear_value_head_dim": 12}),
    "qwen3_5": ("Qwen3_5GatedDeltaNet", "Qwen3_5TextConfig",
                {**RULE, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3}),
    "kimi_linear": ("KimiLinearDeltaAttention", "KimiLinearConfig",
                    {"hidden_size": 24, "linear_num_heads": 2, "linear_head_dim": 8,
                     "num_hidden_layers": 1, "layer_types": ["linear_attention"]}),
    "mamba2": ("Mamba2Mixer", "Mamba2Config",
               {"hidden_size": 24, "num_heads": 6, "head_dim": 8, "state_size": 12, "n_groups": 2,
                "num_hidden_layers": 1, "chunk_size": 16}),
    "zamba2": ("Zamba2MambaMixer", "Zamba2Config",
               {"hidden_size": 24, "n_mamba_heads": 6, "mamba_headdim": 8, "mamba_d_state": 8,
                "mamba_ngroups": 1, "num_hidden_layers": 1, "layer_types": ["linear_attention"],
                "add_bias_linear": True,
                "time_step_min": 0.01, "chunk_size": 16}),
}  # fmt: skip
each_pair = pytest.mark.parametrize("kind", THEIRS)
each = pytest.mark.parametrize("kind", ["qwen3_next", "kimi_linear", "mamba2"])


def theirs(kind):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    layer, config, options = THEIRS[kind]
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    torch.manual_seed(0)
    made = getattr(module, layer)(getattr(transformers, config)(**options), 0)
    with torch.no_grad():  # some weights are left as they lie in memory
        for name, weight in made.named_parameters():
            if "A_log" in name:
                weight.copy_(torch.rand_like(weight))
            elif weight.dim() == 1:
                weight.copy_(torch.randn_like(weight) * 0.3 + 0.5)
    return made


def pair(kind):
    oracle, own = theirs(kind), OWN[kind]()
    own.load_state_dict(oracle.state_dict())
    return oracle, own


def made(kind):
    torch.manual_seed(0)
    return OWN[kind]().requires_grad_(False)


def inputs(*shape):
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1))


@each_pair
def test_results_and_gradients_are_of_transformers(kind):
    oracle, own = pair(kind)
    xs = [inputs(2, 41).requires_grad_() for _ in range(2)]
    y, wanted = own(xs[0]), oracle(xs[1])
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    for found in (y, wanted):
        found.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, atol=2e-5, rtol=1e-3)
    mine = dict(own.named_parameters())
    if kind == "qwen3_next":  # the rows of these are in another order
        assert not any("qkvz" in name for name in mine)
    for name, weight in oracle.named_parameters():
        if name in mine:
            torch.testing.assert_close(
                mine[name].grad, weight.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: n + m
            )


@each_pair
@torch.no_grad()
def test_half_precision_is_as_near_as_theirs(kind):
    oracle, own = pair(kind)
    x = inputs(2, 70)
    for dtype in (torch.bfloat16, torch.float16):
        oracle, own = oracle.to(dtype), own.to(dtype)
        exact = pair(kind)[0]
        exact.load_state_dict(oracle.state_dict())
        wanted = exact(x.to(dtype).float())
        errors = [(m(x.to(dtype)).float() - wanted).norm() for m in (own, oracle)]
        assert errors[0] <= 1.05 * errors[1]
        assert own(x.to(dtype)).dtype == dtype


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_prompts_in_pieces_and_steps(kind, dtype):
    layer, x = made(kind).to(dtype), inputs(3, 21).to(dtype)
    wanted = layer(x)
    state = layer.new_state(5)
    state.conv.fill_(7), state.recurrent.fill_(7)
    slots = torch.tensor([4, 0, 3], dtype=torch.int32)
    state.reset(slots)
    kept = state.conv[1].clone(), state.recurrent[1].clone()
    ys = [layer.prefill(x[:, :1], state, slots), layer.prefill(x[:, 1:15], state, slots)]
    ys += [layer.decode(x[:, 15:18], state, slots)]
    ys += [layer.decode(x[:, t : t + 1], state, slots) for t in range(18, 21)]
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    )
    torch.testing.assert_close(torch.cat(ys, 1), wanted, **tolerance)
    assert torch.equal(state.conv[1], kept[0]) and torch.equal(state.recurrent[1], kept[1])
    own = layer.new_state(3)  # without slots
    ys = [layer.prefill(x[:, :20], own), layer.decode(x[:, 20:], own)]
    torch.testing.assert_close(torch.cat(ys, 1), wanted, **tolerance)
    state.reset()
    assert not state.conv.any() and not state.recurrent.any()


@each
def test_packed_sequences_are_as_alone(kind):
    layer = made(kind).requires_grad_(True)
    ends = torch.tensor([0, 5, 5, 6, 18], dtype=torch.int32)
    x = inputs(18)
    grads = []
    for packed in (True, False):
        if packed:
            y = layer(x, ends)
        else:
            bounds = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
            y = torch.cat([layer(x[None, a:b])[0] for a, b in bounds])
        grads.append([y, *torch.autograd.grad(y.square().sum(), [*layer.parameters()])])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


@each
@torch.no_grad()
def test_empty_and_single_tokens(kind):
    layer = made(kind)
    for shape in ((0, 5), (2, 0), (0, 0)):
        assert layer(inputs(*shape)).shape == (*shape, 24)
    assert layer(inputs(0), torch.zeros(1, dtype=torch.int32)).shape == (0, 24)
    state = layer.new_state(2)
    before = layer.prefill(inputs(2, 3), state)
    held = state.conv.clone(), state.recurrent.clone()
    for call in (layer.prefill, layer.decode):
        assert call(inputs(2, 0), state).shape == (2, 0, 24)
        assert call(inputs(0, 3), state).shape == (0, 3, 24)
    assert torch.equal(state.conv, held[0]) and torch.equal(state.recurrent, held[1])
    torch.testing.assert_close(before[:, :1], layer(inputs(2, 3)[:, :1]), atol=1e-5, rtol=1e-4)


@each
@torch.no_grad()
def test_one_sequence_does_not_reach_another(kind):
    layer, x = made(kind), inputs(3, 9)
    wanted = layer(x)
    x[1, 4:] = float("nan")
    y = layer(x)
    assert torch.equal(y[[0, 2]], wanted[[0, 2]]) and y[1, 4:].isnan().all()
    assert torch.equal(y[1, :4], wanted[1, :4])
    packed = layer(x.flatten(0, 1), torch.tensor([0, 9, 18, 27], dtype=torch.int32))
    assert not packed[:13].isnan().any() and not packed[18:].isnan().any()
    state = layer.new_state(4)
    slots = torch.tensor([2, -1, 0], dtype=torch.int32)
    for t in range(9):  # padding may hold anything
        y = layer.decode(x[:, t : t + 1], state, slots)
        assert not y[1].any()
        torch.testing.assert_close(y[[0, 2]], wanted[[0, 2], t : t + 1], atol=1e-5, rtol=1e-4)
    assert not state.recurrent[[1, 3]].any() and not state.conv[[1, 3]].any()


@each
@pytest.mark.parametrize(
    ("rule", "call"),
    [
        (r"x: must have shape \[B, T, 24\]; got \[2, 3, 4, 24\]", lambda m, s: m(inputs(2, 3, 4))),
        (r"x: must have shape \[B, T, 24\]; got \[3, 24\]", lambda m, s: m(inputs(3))),
        (r"x: must have shape \[T, 24\] with cu_seqlens",
         lambda m, s: m(inputs(1, 3), torch.tensor([0, 3], dtype=torch.int32))),
        (r"x: must have the dtype of the weights", lambda m, s: m(inputs(2, 3).half())),
        (r"x: must be a tensor", lambda m, s: m([1.0])),
        (r"cu_seqlens: must end at the number of tokens, 3",
         lambda m, s: m(inputs(3), torch.tensor([0, 2], dtype=torch.int32))),
        (r"state: must be a RecurrentState", lambda m, s: m.decode(inputs(2, 1), s.conv)),
        (r"state: must have a slot for each of 4 sequences",
         lambda m, s: m.decode(inputs(4, 1), s)),
        (r"state: must have a part of shape",
         lambda m, s: m.prefill(inputs(2, 1), nn.RecurrentState(s.conv, s.recurrent[..., :4]))),
        (r"state: must have the dtype of the weights",
         lambda m, s: m.prefill(inputs(2, 1), nn.RecurrentState(s.conv.half(), s.recurrent))),
        (r"slots: must be -1 to 2; got 3", lambda m, s: m.decode(inputs(2, 1), s, slots_of(0, 3))),
        (r"slots: must be -1 to 2; got -2",
         lambda m, s: m.decode(inputs(2, 1), s, slots_of(0, -2))),
        (r"slots: must be 0 to 2; got -1",
         lambda m, s: m.prefill(inputs(2, 1), s, slots_of(0, -1))),
        (r"slots: must be 0 to 2; got 3", lambda m, s: m.prefill(inputs(2, 1), s, slots_of(0, 3))),
        (r"slots: must not repeat a slot", lambda m, s: m.decode(inputs(2, 1), s, slots_of(1, 1))),
        (r"slots: must have shape \[2\]", lambda m, s: m.decode(inputs(2, 1), s, slots_of(1))),
        (r"slots: must be int32", lambda m, s: m.decode(inputs(2, 1), s, slots_of(1, 2).long())),
        (r"state: requires torch.no_grad\(\)",
         lambda m, s: m.requires_grad_().decode(inputs(2, 1), s)),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(kind, rule, call):
    layer = made(kind)
    state = layer.new_state(3)
    with pytest.raises(RuntimeError, match=rule):
        call(layer, state)
    assert not state.conv.any() and not state.recurrent.any()


def slots_of(*slots):
    return torch.tensor(slots, dtype=torch.int32)


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (r"GatedDeltaNet: num_v_heads: must be a multiple of num_heads, 2; got 3",
         lambda: nn.GatedDeltaNet(8, 2, 3)),
        (r"GatedDeltaNet: num_heads: must be an integer", lambda: nn.GatedDeltaNet(8, None)),
        (r"GatedDeltaNet: head_v_dim: must be 1 to 256", lambda: nn.GatedDeltaNet(8, 2, 2, 8, 300)),
        (r"KimiDeltaAttention: conv_kernel: must be 1 to 8",
         lambda: nn.KimiDeltaAttention(8, 2, 8, conv_kernel=9)),
        (r"KimiDeltaAttention: dim: must be 1", lambda: nn.KimiDeltaAttention(0)),
        (r"Mamba2: n_groups: must divide the number of heads, 4",
         lambda: nn.Mamba2(8, 4, n_groups=3)),
        (r"Mamba2: head_dim: must be a divisor of 2 dim, 16", lambda: nn.Mamba2(8, head_dim=3)),
        (r"Mamba2: time_step_limit: must ascend", lambda: nn.Mamba2(32, time_step_limit=(1, 0))),
        (r"Mamba2: time_step_limit: must be two", lambda: nn.Mamba2(32, time_step_limit=1)),
        (r"RecurrentState: recurrent: must be float32",
         lambda: nn.RecurrentState(torch.zeros(2, 3, 3), torch.zeros(2, 1, 2, 2).half())),
        (r"RecurrentState: recurrent: must have the 2 slots of conv",
         lambda: nn.RecurrentState(torch.zeros(2, 3, 3), torch.zeros(3, 1, 2, 2))),
    ],
)  # fmt: skip
def test_wrong_sizes_are_refused(rule, make):
    with pytest.raises(RuntimeError, match=rule):
        make()


@each
@torch.no_grad()
def test_autocast_and_a_convolution_of_one_tap(kind):
    layer, x = made(kind), inputs(2, 12)
    wanted = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = layer.new_state(2)
        y = torch.cat([layer.prefill(x[:, :10], state), layer.decode(x[:, 10:], state)], 1)
    assert (y.float() - wanted).norm() <= 0.03 * wanted.norm()
    sizes = {"qwen3_next": (24, 2, 4, 8, 12), "kimi_linear": (24, 2, 8), "mamba2": (24, None, 8)}
    cls = type(layer)
    single = cls(*sizes[kind], conv_kernel=1)
    state = single.new_state(2)
    y = torch.cat([single.prefill(x[:, :10], state), single.decode(x[:, 10:], state)], 1)
    torch.testing.assert_close(y, single(x), atol=1e-5, rtol=1e-4)
