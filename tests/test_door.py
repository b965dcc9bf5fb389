"""Operators called through module _C: the same bits and the same messages as through torch.ops."""

from __future__ import annotations

import math
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import backends, device_of
from test_contract import SPECS, draw
from test_derivatives import as_tuple

import tokenmill as tm
from tokenmill import _explain
from tokenmill._call import choose, door
from tokenmill.testing import map_tensors

NATIVE = [b for b in backends() if b in ("cpu", "emulated", "cuda")]
each_call = pytest.mark.parametrize(
    ("spec", "backend"),
    [
        pytest.param(s, b, id=f"{s.name}-{b}")
        for s in SPECS
        for b in NATIVE
        if _explain.able(s, s.samples[0], b)
    ],
)


def arguments(spec, sample, backend):
    args, kwargs = draw(sample)
    return map_tensors(list(spec.lower(*args, **kwargs)), lambda t: t.to(device_of(backend)))


def copied(values):
    return map_tensors(values, torch.clone)


def same(found, want):
    for f, w in zip(found, want, strict=True):
        if isinstance(w, torch.Tensor):
            assert f.shape == w.shape and f.dtype == w.dtype and f.stride() == w.stride()
            bits = [x.contiguous().view(torch.uint8) for x in (f, w) if x.dim()]
            assert len(bits) < 2 or torch.equal(*bits)


def test_this_build_has_the_door():
    assert set(tm.registry.ops()) <= set(door.functions(tm._call.library.LIBRARY_PATH))


@each_call
def test_both_doors_give_the_same_bits(spec, backend):
    namespace = choose.namespace(backend)
    samples = spec.samples if backend != "emulated" else spec.samples[:1]
    for sample in (s for s in samples if _explain.able(spec, s, backend)):
        values = arguments(spec, sample, backend)
        one, other = copied(values), copied(values)
        found = as_tuple(spec.forward.direct(namespace)(*one))
        same(found, as_tuple(spec.forward.run(namespace, other)))
        same(one, other)  # written arguments


@each_call
def test_arguments_go_by_name_and_have_defaults(spec, backend):
    op, namespace = spec.forward, choose.namespace(backend)
    values = arguments(spec, spec.samples[0], backend)
    names = dict(zip(op.arguments, copied(values), strict=True))
    shown = {a.name: a.default_value for a in op.overload()._schema.arguments}
    for name, value in shown.items():
        if value is not None and type(names[name]) is type(value) and names[name] == value:
            del names[name]
    same(as_tuple(op.direct(namespace)(**names)), as_tuple(op.run(namespace, copied(values))))


@each_call
def test_both_doors_refuse_with_the_same_words(spec, backend):
    op, namespace = spec.forward, choose.namespace(backend)
    values = arguments(spec, spec.samples[0], backend)
    tensors = sum(isinstance(x, torch.Tensor) for x in values)
    for i, value in enumerate(values):
        bad = [None] if tensors > 1 else []  # torch finds no kernel without tensors
        if isinstance(value, torch.Tensor):
            bad += [value.double(), value[None, None]]
        elif isinstance(value, str):
            bad = ["nonsense"]
        elif not isinstance(value, bool) and isinstance(value, int):
            bad = [-(2**40)]
        elif isinstance(value, float):
            bad = [math.nan]
        else:
            continue
        for x in bad:
            edited = [*copied(values[:i]), x, *copied(values[i + 1 :])]
            try:
                want = as_tuple(op.run(namespace, copied(edited)))
            except RuntimeError as error:
                with pytest.raises(RuntimeError) as found:
                    op.direct(namespace)(*edited)
                assert str(found.value) == str(error)
            else:
                same(as_tuple(op.direct(namespace)(*edited)), want)


def test_arguments_of_a_wrong_kind_are_named():
    op = tm._call.operator.registered("attention")
    call = op.direct("tokenmill")
    q = torch.zeros(1, 2, 1, 4)
    for given, rule in (
        ({"causal": 1}, "causal: must be a bool; got 1"),
        ({"scale": "x"}, "scale: must be a number; got 'x'"),
        ({"window_left": 2.0}, "window_left: must be an integer of 64 bits; got 2.0"),
        ({"window_left": 2**70}, "window_left: must be an integer of 64 bits; got 1180"),
        ({"kind": None}, "kind: must be given; got None"),
        ({"kind": b"softmax"}, "kind: must be a string; got b'softmax'"),
    ):
        with pytest.raises(RuntimeError, match=rf"^tokenmill\.attention: {rule}"):
            call(q, q, q, **given)
    for args, given, rule in (
        ((q, q), {}, "v must be given"),
        ((q, q, q), {"k": q}, "'k' is given twice"),
        ((q, q, q), {"heads": 3}, "there is no argument 'heads'"),
        ((q,) * 30, {}, f"takes {len(op.arguments)} arguments; got 30"),
    ):
        with pytest.raises(TypeError, match=rf"^tokenmill\.attention: {rule}"):
            call(*args, **given)


SPECIAL = {
    "subclass": torch.nn.Parameter,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "negated": torch._neg_view,
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[0]]),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_ordinary_tensor_takes_the_dispatcher(make):
    x = torch.randn(1, 4, 2, 8)
    call = tm._call.operator.registered("attention").direct("tokenmill")
    assert call(x, x, make(x)) is NotImplemented
    assert call(make(x), x, x) is NotImplemented


@pytest.mark.parametrize("api", ["missing", "of another kind", "without a question"])
def test_a_torch_without_the_table_has_the_dispatcher(api):
    change = {
        "missing": "del torch.Tensor.__dlpack_c_exchange_api__",
        "of another kind": "torch.Tensor.__dlpack_c_exchange_api__ = None",
        "without a question": "del torch._C._len_torch_function_stack",
    }[api]
    code = f"""import torch
{change}
import tokenmill as tm
assert not tm._call.door.functions(tm._call.library.LIBRARY_PATH)
x = torch.ones(1, 3, 1, 4)
assert torch.equal(tm.attention(x, x, x), x)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plain_calls_take_the_short_way(monkeypatch):
    op = tm._call.operator.registered("attention")
    x = torch.randn(1, 4, 2, 8)

    def short(t, used=2, record=None):
        return op.short((t, t), {"v": t}, used, record)

    out, lse = short(x)
    for used, want in ((0, ()), (1, (out,)), (9, (out, lse))):
        found = short(x, used)
        assert len(found) == len(want) and all(map(torch.equal, found, want))
    assert short(x.double()) is NotImplemented
    assert short(torch.nn.Parameter(x, requires_grad=False)) is NotImplemented
    assert op.short((x,), {"k": x}, 2, None) is NotImplemented  # the public function names v
    assert op.short((x, x, x), {"causal": 1}, 2, None) is NotImplemented
    g = x.clone().requires_grad_()
    assert short(g) is None
    noted = short(g, record=lambda *call: call)
    assert noted == (op.direct("tokenmill"), 2, ("q", "k", "v"), {}, g, g, g)
    assert short(g, record=lambda *call: out) == (out,)
    with torch.no_grad():
        assert torch.equal(short(g)[0], out)
    with torch.autocast("cpu", torch.bfloat16):
        assert short(x) is NotImplemented
    for name in ("TOKENMILL_BACKEND", "TOKENMILL_CHECK"):
        with monkeypatch.context() as environment:
            environment.setenv(name, "1")
            assert short(x) is NotImplemented
    for given, rule in (
        (((x,) * 99, {}, 1, None), f"takes a tuple of at most {len(op.arguments)} arguments"),
        (((x, x), [x], 1, None), "takes a tuple of at most .* arguments, and a dict"),
        (((x, x, x), {"q": x}, 1, None), "'q' is given twice"),
        (((x, x, x), {"heads": 1}, 1, None), "there is no argument 'heads'"),
        (((x, x, x), {}, 1), "takes arguments by position, by name, a number of results and"),
    ):
        with pytest.raises(TypeError, match=rf"^tokenmill\.attention: {rule}"):
            op.short(*given)


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.sugar is not None], ids=lambda spec: spec.name
)
def test_a_call_without_sugar_is_only_checked(spec):
    op, plain = spec.forward, 0
    for sample in spec.samples:
        for dtype in (torch.float32, torch.bfloat16):
            args, kwargs = draw(sample, dtype)
            kwargs = {n: x for n, x in kwargs.items() if n not in spec.sugar}
            if kwargs.keys() <= set(op.arguments):
                plain += 1
                lowered, want = spec.lower(*args, **kwargs), op.bind(args, kwargs)
                for x, y in zip(lowered, want, strict=True):
                    assert x is y if isinstance(y, torch.Tensor) else x == y
    assert plain


def test_results_without_elements_have_shape_and_memory_of_their_own():
    op = tm._call.operator.registered("topk_select")
    scores = torch.randn(3, 5)
    lowered = tm.registry.get("topk_select").lower(scores, 2)
    same(op.short(lowered, {}, 4, None), op.run("tokenmill", lowered))
    first, second = (op.short(lowered, {}, 4, None)[2] for _ in range(2))
    assert first.shape == (0,) and first.is_contiguous() and first is not second
    empty = op.short((scores[:0], 2), {}, 2, None)
    same(empty, op.run("tokenmill", tm.registry.get("topk_select").lower(scores[:0], 2))[:2])


def test_a_lazy_negative_is_negated():
    x = torch.randn(1, 4, 2, 8)
    with torch.no_grad():
        assert torch.equal(tm.attention(x, x, torch._neg_view(x)), tm.attention(x, x, -x))


def test_modes_and_transforms_close_the_door():
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    assert door.is_open()
    for mode in (TorchFunctionMode(), TorchDispatchMode()):
        with mode:
            assert not door.is_open()
    with torch.autocast("cpu", torch.bfloat16):
        assert not door.is_open()
    with torch.autograd.forward_ad.dual_level():
        assert not door.is_open()
    with torch.profiler.profile():
        assert not door.is_open()
    torch.vmap(lambda x: (door.is_open() and pytest.fail(), x)[1])(torch.zeros(1))
    assert door.is_open()


def test_a_profile_names_the_operator():
    x = torch.randn(1, 4, 2, 8)
    with torch.profiler.profile() as profile:
        tm.attention(x, x, x)
    assert "tokenmill::attention" in {event.name for event in profile.events()}


def test_results_live_as_long_as_they_are_held():
    x = torch.randn(1, 64, 2, 8)
    with torch.no_grad():
        kept = [tm.attention(x, x, x, return_lse=True) for _ in range(50)]
        out, lse = tm.attention(x, x, x, return_lse=True)
    assert all(torch.equal(o, out) and torch.equal(m, lse) for o, m in kept)


def test_threads_share_the_door():
    x = torch.randn(1, 33, 2, 8)
    with torch.no_grad():
        want = tm.attention(x, x, x, causal=True)
        found = []

        def run():
            with torch.no_grad():
                found.extend(tm.attention(x, x, x, causal=True) for _ in range(50))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 200 and all(torch.equal(f, want) for f in found)


def test_arrays_of_another_framework():
    from tokenmill import dlpack

    x = np.random.default_rng(0).standard_normal((1, 8, 2, 16)).astype(np.float32)
    out, lse = dlpack.attention(x, x, x, causal=True, return_lse=True)
    t = torch.from_numpy(x)
    want = tm.attention(t, t, t, causal=True, return_lse=True)
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    assert np.array_equal(out, want[0].numpy()) and np.array_equal(lse, want[1].numpy())
    cache = np.zeros((1, 2, 16, 16), np.float32)
    dlpack.linear_attention_decode(x[:, :1], x[:, :1], x[:, :1], cache)
    assert cache.any()
    with pytest.raises(RuntimeError, match=r"^tokenmill\.attention: v: must have the dtype of q"):
        dlpack.attention(x, x, x.astype(np.float16))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dlpack.nothing  # noqa: B018
