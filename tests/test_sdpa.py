"""torch's scaled_dot_product_attention on tokenmill, and its state afterwards."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch.nn import attention as torch_attention
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import tokenmill as tm
from tokenmill._call import library
from tokenmill.integrations import sdpa

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "keys behind the last query": {"is_causal": True, "keys": 12},
    "visible": {"attn_mask": torch.arange(9)[:, None] > torch.arange(9) - 2},
    "a row that sees nothing": {"attn_mask": torch.arange(9)[:, None].expand(9, 9) != 3},
    "bias of each head": {"attn_mask": torch.linspace(-2, 2, 324).view(1, 4, 9, 9)},
    "a transposed bias": {"attn_mask": torch.linspace(-2, 2, 81).view(9, 9).t()},
    "a bias of each query": {"attn_mask": torch.linspace(-2, 2, 9)[:, None].expand(9, 9)},
    "scale": {"scale": 0.1},
    "gqa": {"enable_gqa": True, "heads": 2},
}


def inputs(dtype=torch.float32, heads=4, keys=9):
    shapes = ((2, 9, 4, 16), (2, keys, heads, 16), (2, keys, heads, 16))
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


def run(tensors, **options):
    """Output and gradients."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    if (mask := options.get("attn_mask")) is not None and mask.is_floating_point():
        options["attn_mask"] = mask.to(tensors[0].dtype)
    out = torch_sdpa(*tensors, **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_as_good_as_those_of_torch(name, dtype):
    options = dict(OPTIONS[name])
    sizes = {key: options.pop(key) for key in ("heads", "keys") if key in options}
    tensors = inputs(dtype, **sizes)
    oracle = run([x.double() for x in tensors], **options)
    plain = run(tensors, **options)
    with sdpa.enable() as route:
        found = run(tensors, **options)
    assert route.served == 2 and not route.passed
    tm.testing.assert_accurate(found[0], oracle[0], plain[0])
    for grad, wanted, other in zip(found[1:], oracle[1:], plain[1:], strict=True):
        tm.testing.assert_accurate(grad, wanted, other, gradient=True)
    assert found[0].stride() == plain[0].stride()
    assert all(map(torch.equal, run(tensors, **options), plain))  # torch's kernels are restored


@pytest.mark.parametrize("ours", [(True, False), (False, True)], ids=["forward", "backward"])
def test_one_half_of_a_call_may_be_that_of_torch(ours):
    """Row 3 sees nothing: torch gives it lse 0."""
    mask = OPTIONS["a row that sees nothing"]["attn_mask"]
    tensors = [x.requires_grad_() for x in inputs()]
    expected = torch.autograd.grad(torch_sdpa(*tensors, attn_mask=mask).square().sum(), tensors)
    with contextlib.ExitStack() as stack:
        if ours[0]:
            with sdpa.enable():
                out = torch_sdpa(*tensors, attn_mask=mask)
        else:
            out = torch_sdpa(*tensors, attn_mask=mask)
            stack.enter_context(sdpa.enable())
        found = torch.autograd.grad(out.square().sum(), tensors)
    torch.testing.assert_close(found, expected)


def layer_and_grads(layer, x, **masks):
    layer.zero_grad()
    out = layer(x, **masks)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in layer.parameters())]


def test_a_transformer_layer_goes_through():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 32)
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(9)
    for masks in ({}, {"src_key_padding_mask": padding}, {"src_mask": causal, "is_causal": True}):
        expected = layer_and_grads(layer, x, **masks)
        with sdpa.enable() as route:
            found = layer_and_grads(layer, x, **masks)
        assert (route.served, route.passed) == (2, {})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_attention_of_a_module_in_a_graph_under_autocast():
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    compiled = torch.compile(
        lambda x: module(x, x, x, need_weights=False)[0], backend="aot_eager", fullgraph=True
    )
    x = torch.randn(2, 9, 32)
    expected = module(x, x, x, need_weights=False)[0]
    with sdpa.enable() as route:
        torch.testing.assert_close(compiled(x), expected)
        assert route.served == 1
        with torch.autocast("cpu", torch.bfloat16):
            out = compiled(x)
        assert route.served == 2 and out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)
    compiled(x)
    assert route.served == 2


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda: inputs(keys=5), {"is_causal": True}, "more queries than keys"),
        (lambda: inputs(torch.float64), {}, "float64"),
        (lambda: [torch.randn(1, 1, 3, 257)] * 3, {}, "1 to 256"),
        (inputs, {"scale": float("inf")}, "scale must be at most"),
    ],
    ids=["causal", "float64", "wide", "scale"],
)
def test_what_is_not_taken_runs_on_torch_with_one_notice(make, options, reason):
    tensors = make()
    expected = run(tensors, **options)
    with warnings.catch_warnings(record=True) as caught, sdpa.enable() as route:
        warnings.simplefilter("always")
        found = run(tensors, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert route.served == 0 and list(route.passed.values()) == [2]
    assert len(caught) == 1 and reason in str(caught[0].message)


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_a_backend_of_the_environment_that_has_no_kernel_here(backend, monkeypatch):
    tensors = inputs()
    expected = run(tensors)
    monkeypatch.setenv("TOKENMILL_BACKEND", backend)
    with sdpa.enable() as route, pytest.warns(UserWarning, match="torch's kernel runs"):
        found = run(tensors)
    assert all(map(torch.equal, found, expected)) and route.served == 0


def test_routes_nest_and_end():
    q, k, v = inputs()
    with sdpa.enable() as outer:
        with sdpa.enable(backend="cpu") as inner, pytest.raises(ZeroDivisionError):
            torch_sdpa(q, k, v)
            with sdpa.enable():
                raise ZeroDivisionError
        torch_sdpa(q, k, v)
        sdpa.enable()
        sdpa.disable()
        torch_sdpa(q, k, v)
    assert (outer.served, inner.served) == (1, 1)
    with pytest.raises(RuntimeError, match=r"backend: must be cpu, .*; got 'reference'"):
        sdpa.enable(backend="reference")


@pytest.mark.skipif(not sdpa.REGISTRY, reason="torch has no registry of flash attention")
def test_the_registry_of_torch():
    q, k, v = inputs()

    class Other:
        removed = 0

        def remove(self):
            self.removed += 1

    made = []
    torch_attention.register_flash_attention_impl(
        "other", register_fn=lambda: made.append(Other()) or made[-1]
    )
    plain = torch_sdpa(q, k, v)
    torch_attention.activate_flash_attention_impl("other")
    with sdpa.enable() as route:
        assert torch_attention.current_flash_attention_impl() == "tokenmill"
        torch_sdpa(q, k, v)
    assert torch_attention.current_flash_attention_impl() == "other"
    assert (route.served, len(made), made[0].removed, made[1].removed) == (1, 2, 1, 0)
    torch_attention.activate_flash_attention_impl("tokenmill")
    with sdpa.enable():
        pass
    assert torch_attention.current_flash_attention_impl() == "tokenmill"
    assert not torch.equal(torch_sdpa(q, k, v), plain)
    with sdpa.enable() as route:
        torch_attention.activate_flash_attention_impl("other")  # ends the route
        assert torch.equal(torch_sdpa(q, k, v), plain)
    assert torch_attention.current_flash_attention_impl() == "other"
    torch_attention.restore_flash_attention_impl()
    del torch_attention._registry._FLASH_ATTENTION_IMPLS["other"]


@pytest.mark.skipif(not library.emulated_built(), reason="the PTX machine is not built")
def test_cuda_kernels_behind_the_operators_of_cuda():
    """These operators get no CPU tensor: their functions are called as the dispatcher would."""
    tensors = inputs(torch.float16)
    expected = run(tensors, is_causal=True)
    with sdpa.enable(backend="emulated") as route:
        out, lse, *rest = sdpa._cuda_forward(None, *tensors, 0.0, True)
        grads = sdpa._cuda_backward(
            None, 2 * out, *tensors, out, lse, *rest[:4], 0.0, True, *rest[4:6]
        )
    assert route.served == 2 and rest[2:4] == [9, 9] and rest[-1].numel() == 0
    for found, wanted in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
