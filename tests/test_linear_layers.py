"""integrations.linear: oneDNN's products in the linear layers of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenmill.integrations import linear

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
pytestmark = ONEDNN
PRODUCT = "mkldnn._linear_pointwise.default"


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def made(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48, bias), nn.GELU(), nn.Linear(48, 8, bias)).to(dtype)


def products(model, x):
    with Calls() as calls:
        model(x)
    return calls.names.count(PRODUCT)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 5, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_of_the_same_product(dtype, shape, bias, pack):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this machine")
    model, x = made(dtype, bias), torch.randn(shape).to(dtype)
    with torch.no_grad():
        want = model(x)
        with linear.enable(model, use="onednn", pack=pack):
            assert products(model, x) == 2
            found = model(x)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, want, rtol=8 * eps, atol=8 * eps)


def test_gradients_are_those_of_torch():
    model, x = made(), torch.randn(3, 5, 24, requires_grad=True)
    leaves = [x, *model.parameters()]
    want = torch.autograd.grad(model(x).square().sum(), leaves)
    with linear.enable(model, use="onednn", pack=True):
        with Calls() as calls:
            found = torch.autograd.grad(model(x).square().sum(), leaves)
        assert calls.names.count(PRODUCT) == 2
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    layer = nn.Sequential(nn.Linear(3, 2))
    with linear.enable(layer, use="onednn"):
        x = torch.randn(4, 3, requires_grad=True)
        (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(g.sum(), layer[0].weight)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(g.sum(), layer[0].weight)
    torch.testing.assert_close(found, want)


def test_the_faster_one_is_kept_for_each_shape(monkeypatch):
    model, seconds = made(), iter([2.0, 1.0, 1.0, 2.0, 3.0, 1.0, 1.0, 3.0])
    monkeypatch.setattr(linear, "_times", lambda *calls: [next(seconds), next(seconds)])
    with linear.enable(model) as linears, torch.no_grad():
        for rows, runs in ((3, 1), (4, 1), (16, 1), (4, 1)):  # 3 and 4 rows share a measurement
            assert products(model, torch.randn(rows, 24)) == runs
    threads = torch.get_num_threads()
    assert linears.choices == {
        (torch.float32, rows, *layer, False, threads): layer == (48, 24)
        for rows in (4, 16)
        for layer in ((48, 24), (8, 48))
    }


def test_times_of_both_are_measured():
    model = made()
    with linear.enable(model) as linears, torch.no_grad():
        model(torch.randn(4, 24))
    assert len(linears.choices) == 2


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)
def test_a_weight_that_changes_is_packed_anew():
    model, x = made(torch.bfloat16), torch.randn(1, 24).bfloat16()
    with linear.enable(model, use="onednn", pack=True), torch.no_grad():
        model(x)
        model[0].weight.mul_(2)  # in place
        model[2].weight = nn.Parameter(model[2].weight * 3)  # another tensor
        found = model(x)
    torch.testing.assert_close(found, model(x), rtol=0.05, atol=0.05)


def test_calls_that_stay_as_they_are():
    model = made()
    x = torch.randn(6, 24)
    want = model(x)
    with linear.enable(model, use="onednn"):
        with torch.autocast("cpu", torch.bfloat16):
            assert products(model, x) == 0
        assert products(model, x[:0]) == 0
        assert products(model, x[:, ::1].mT.contiguous().mT) == 1  # the inner result is contiguous
        found = torch.vmap(model)(x)
        torch.testing.assert_close(found, want)
        _, tangent = torch.func.jvp(model, (x,), (x,))
        assert tangent.shape == want.shape
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want)
        double = copy.deepcopy(model).double()
        assert products(double, x.double()) == 0


def test_layers_are_restored():
    model, x = made(), torch.randn(2, 24)
    linears = linear.enable(model, use="onednn")
    assert linears.layers == ["0", "2"]
    with pytest.raises(RuntimeError, match=r"model: must have no linear layer with .*; got '0'"):
        linear.enable(model)
    with pytest.raises(ZeroDivisionError), linears:
        raise ZeroDivisionError
    linears.remove()
    assert products(model, x) == 0 and not [m for m in model if "forward" in vars(m)]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"model": 3}, "model: must be a torch.nn.Module; got 'int'"),
        ({"use": "mkl"}, "use: must be 'faster' or 'onednn'; got 'mkl'"),
        ({"pack": 1}, "pack: must be a bool; got 1"),
    ],
)
def test_wrong_options_are_refused(options, rule):
    with pytest.raises(RuntimeError, match=rule):
        linear.enable(**{"model": made(), **options})
