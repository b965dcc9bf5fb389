"""Derivatives of every operator beyond first-order autograd: the transforms of torch.func, and
forward mode and second derivatives, which the reference supports and a kernel refuses."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.autograd.forward_ad as fwd
import torch.utils.checkpoint
from conftest import backends, device_of
from test_contract import same_bits

import tokenmill as tm
from tokenmill import _explain, registry
from tokenmill._call import choose


def draw(spec, backend="reference", seed=0):
    """Arguments and keywords of the smallest non-degenerate sample."""
    args, kwargs = small(spec).make(torch.float32, torch.Generator().manual_seed(seed))
    device = device_of(backend)
    there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in (*args, *kwargs.values())]
    return there[: len(args)], dict(zip(kwargs, there[len(args) :], strict=True))


def size(sample):
    args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
    return sum(x.numel() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))


@functools.cache
def small(spec):
    sizes = {sample.name: size(sample) for sample in spec.samples}
    fit = [sample for sample in spec.samples if sizes[sample.name] >= 300]
    return min(fit, key=lambda sample: sizes[sample.name], default=spec.samples[0])


def small_enough(spec, backend):
    """True unless Triton's interpreter, which runs programs serially, would take too long."""
    return backend != "triton" or device_of(backend) != "cpu" or size(small(spec)) < 1000


def each(specs, backends):
    """Each operator on each of the backends that have kernels of it."""
    calls = [
        (spec, b)
        for spec in specs
        for b in backends
        if small_enough(spec, b) and _explain.able(spec, spec.samples[0], b)
    ]
    return pytest.mark.parametrize(("spec", "backend"), calls, ids=lambda x: getattr(x, "name", x))


SPECS = list(registry.ops().values())
DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def function_of_leaves(spec, backend, call=None):
    """The floating-point results as a function of inputs with a gradient, and the values of
    these."""
    args, kwargs = call or draw(spec, backend)
    parameters = list(inspect.signature(spec.function).parameters)
    keys = [*range(len(args)), *kwargs]  # the schema may use other argument names
    names = [
        (parameters[k], spec.forward.arguments[k]) if k in range(len(args)) else (k,) for k in keys
    ]
    given = dict(zip(keys, (*args, *kwargs.values()), strict=True))
    leaves = [
        key
        for key, known in zip(keys, names, strict=True)
        if is_float(given[key]) and set(known) & set(spec.differentiable)
    ]

    def run(*values):
        there = {**given, **dict(zip(leaves, values, strict=True))}
        called = [there[i] for i in range(len(args))]
        result = spec.function(*called, **{k: there[k] for k in kwargs}, backend=backend)
        # The log-sum-exp of nothing is -inf for every nearby input.
        return tuple(torch.where(torch.isinf(r), 0.0, r) for r in as_tuple(result) if is_float(r))

    return run, tuple(given[key] for key in leaves)


def as_tuple(result):
    return tuple(tm.testing.tensors_of(result))


def penalty(run):
    return lambda *values: sum(r.square().sum() for r in run(*values))


def penalised(run, values):
    """Derivatives of the squared gradients."""
    values = [v.clone().requires_grad_() for v in values]
    first = torch.autograd.grad(penalty(run)(*values), values, create_graph=True)
    total = sum(g.square().sum() for g in first)
    return first, torch.autograd.grad(total, values, allow_unused=True)


def refused(spec, what):
    return pytest.raises(
        RuntimeError,
        match=rf"tokenmill\.{spec.name}: \w+: must not {what} .*, use backend='reference'; got ",
    )


@each(DIFFERENTIABLE, backends())
def test_torch_func_grad_is_autograds(spec, backend):
    run, values = function_of_leaves(spec, backend)
    everything = tuple(range(len(values)))
    found = torch.func.grad(penalty(run), argnums=everything)(*values)
    want = torch.autograd.grad(penalty(run)(*(v.requires_grad_() for v in values)), values)
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))


@each(SPECS, backends())
def test_a_kernel_refuses_tangents(spec, backend):
    args, kwargs = draw(spec, backend)
    lowered = spec.lower(*args, **kwargs)
    namespace = choose.namespace(backend)
    results = as_tuple(spec.forward.fake(spec.forward.record(*lowered)))
    constant = not any(is_float(r) and r.shape != (0,) for r in results)
    constant = constant and not spec.forward.written
    if not any(is_float(x) for x in lowered):
        return

    def dual(x):
        return fwd.make_dual(x, torch.ones_like(x)) if is_float(x) else x

    with fwd.dual_level():
        lowered, args = list(map(dual, lowered)), list(map(dual, args))
        kwargs = {name: dual(x) for name, x in kwargs.items()}
        calls = [
            lambda: spec.forward.run(namespace, lowered),
            lambda: spec.function(*args, **kwargs, backend=backend),
        ]
        for run in calls:
            if constant:
                run()
                continue
            with torch.no_grad(), refused(spec, "have a tangent"):
                run()


@each(DIFFERENTIABLE, backends())
def test_jvp_of_a_kernel_is_refused(spec, backend):
    run, values = function_of_leaves(spec, backend)
    with refused(spec, "have a tangent"):
        torch.func.jvp(run, values, tuple(map(torch.ones_like, values)))


@each(DIFFERENTIABLE, backends())
def test_second_derivatives_are_right_or_refused(spec, backend):
    run, values = function_of_leaves(spec, backend)
    # Moving rows is linear: the gradient consists of operators that have one.
    if spec.name in ("gather_tokens", "scatter_tokens"):
        _, found = penalised(run, values)
        _, want = penalised(*function_of_leaves(spec, "reference"))
        for f, w in zip(found, want, strict=True):
            torch.testing.assert_close(f.cpu(), w)
        return
    with refused(spec, "be differentiated twice"):
        penalised(run, values)
    inner = torch.func.grad(penalty(run))
    with refused(spec, "be differentiated twice"):
        torch.func.grad(lambda *v: inner(*v).square().sum())(*values)


@each(DIFFERENTIABLE, ["reference"])
def test_the_reference_has_all_derivatives(spec, backend):
    wide = tm.testing.convert(draw(spec), torch.float64)
    run, values = function_of_leaves(spec, backend, wide)
    values = [v.requires_grad_() for v in values]
    given = {"fast_mode": True, "raise_exception": True}
    assert torch.autograd.gradcheck(
        run, values, check_forward_ad=True, check_backward_ad=False, **given
    )
    assert torch.autograd.gradgradcheck(run, values, **given)


@each(SPECS, ["cpu"])
def test_vmap_calls_an_operator_for_each_element(spec, backend):
    """Arguments come from two draws; written arguments are written for each."""
    calls = [draw(spec, seed=seed) for seed in (0, 1)]
    pairs = [spec.lower(*args, **kwargs) for args, kwargs in calls]
    op = spec.forward.overload(choose.namespace(backend))
    given = dict(zip(spec.forward.arguments, pairs[0], strict=True))
    written = [name for name in spec.forward.written if given[name] is not None]
    places = [spec.forward.arguments.index(name) for name in written]
    dims = [0 if isinstance(x, torch.Tensor) else None for x in pairs[0]]

    def stacked():
        return [x if d is None else torch.stack(x) for x, d in zip(columns, dims, strict=True)]

    def run(*arguments):
        return (*as_tuple(spec.forward.call(op, arguments)), *(arguments[i] for i in places))

    columns = [x if isinstance(x[0], torch.Tensor) else x[0] for x in zip(*pairs, strict=True)]
    apart = stacked()
    found = torch.vmap(run, in_dims=tuple(dims))(*stacked())
    for i in range(2):
        row = [x if d is None else x[i] for x, d in zip(apart, dims, strict=True)]
        assert same_bits([f[i] for f in found], run(*row))
    for name, place in zip(written, places, strict=True):
        once = [None if i == place else d for i, d in enumerate(dims)]
        shared = [pairs[0][place] if i == place else x for i, x in enumerate(apart)]
        with pytest.raises(RuntimeError, match=f"tokenmill.{spec.name}: {name}: must be batched"):
            torch.vmap(run, in_dims=tuple(once))(*shared)


def attend(x, backend=None):
    return tm.attention(x, x, x, causal=True, backend=backend)


def test_gradients_of_samples_and_jacobians_are_those_of_the_reference():
    x = torch.randn(3, 1, 5, 2, 4)
    layer = torch.nn.Linear(4, 4)
    weights = dict(layer.named_parameters())

    def loss(weights, x, backend):
        return attend(torch.func.functional_call(layer, weights, x), backend).square().sum()

    def all_of(backend):
        return (
            *torch.vmap(torch.func.grad(loss), (None, 0, None))(weights, x, backend).values(),
            torch.func.grad(lambda x: torch.vmap(lambda y: attend(y, backend))(x).sum())(x),
            torch.func.jacrev(lambda y: attend(y, backend))(x[0]),
            torch.func.vjp(lambda y: attend(y, backend), x[0])[1](torch.ones_like(x[0]))[0],
        )

    for found, want in zip(all_of("cpu"), all_of("reference"), strict=True):
        torch.testing.assert_close(found, want)
    with pytest.raises(RuntimeError, match=r"attention: q: .*batch of at least 1 in vmap; got 0"):
        torch.vmap(lambda y: attend(y, "cpu"))(x[:0])


def test_a_graph_for_more_derivatives_costs_nothing_until_one_is_taken():
    x = torch.randn(1, 5, 2, 4, requires_grad=True)
    (want,) = torch.autograd.grad(attend(x).square().sum(), x)
    (found,) = torch.autograd.grad(attend(x).square().sum(), x, create_graph=True)
    assert torch.equal(found, want)
    with pytest.raises(RuntimeError, match=r"tokenmill\.attention: q: .*differentiated twice"):
        found.sum().backward()


def test_compiled_autograd_takes_the_gradient_of_a_call():
    """It finds the code of a backward by a key of the function that recorded it."""
    x = torch.randn(1, 5, 2, 4, requires_grad=True)
    (want,) = torch.autograd.grad(attend(x.sin()).sum(), x)
    graphs = []

    def compiler(graph):
        graphs.append(graph)
        return graph

    with torch._dynamo.compiled_autograd._enable(compiler):
        attend(x.sin()).sum().backward()
    assert graphs and torch.equal(x.grad, want)


def test_a_gradient_is_the_same_where_a_checkpoint_computes_again():
    x = torch.randn(1, 5, 2, 4, requires_grad=True)

    def layers(x):
        return attend(attend(x.sin()).cos())

    again = torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False)
    (found,) = torch.autograd.grad(again.sum(), x)
    (want,) = torch.autograd.grad(layers(x).sum(), x)
    assert torch.equal(found, want)


@pytest.mark.parametrize("transform", ["jvp", "grad of grad", "hessian"])
def test_compiled_functions_name_the_operator_too(transform):
    def loss(x):
        return attend(x, "cpu").square().sum()

    inner = torch.func.grad(loss)
    run = {
        "jvp": lambda x: torch.func.jvp(loss, (x,), (x,))[1],
        "grad of grad": torch.func.grad(lambda x: inner(x).square().sum()),
        "hessian": torch.func.hessian(loss),
    }[transform]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"tokenmill\.attention: q: .*use backend="):
        compiled(torch.randn(1, 3, 1, 4))


def test_a_compiled_function_refuses_a_tangent():
    compiled = torch.compile(lambda x: attend(x, "cpu"), fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 1, 4)
    compiled(x)
    with fwd.dual_level(), pytest.raises(RuntimeError, match=r"tokenmill\.attention: q: .*tangent"):
        compiled(fwd.make_dual(x, x))


def test_the_cotangent_of_a_gradient_may_have_no_tangent():
    x = torch.randn(1, 5, 2, 4, requires_grad=True)
    out = attend(x, "cpu")
    with fwd.dual_level(), pytest.raises(RuntimeError, match=r"tokenmill\.attention: .*tangent"):
        torch.autograd.grad(out, x, fwd.make_dual(torch.ones_like(out), out.detach()))


def test_what_refuses_gradients_does_so_under_torch_func():
    spec = registry.get("attention_decode")
    (q, *others), kwargs = draw(spec)
    with pytest.raises(RuntimeError, match="q: must not require a gradient, there is none"):
        torch.func.grad(lambda q: spec.function(q, *others, **kwargs).sum())(q)
    raw = spec.lower(q.clone().requires_grad_(), *others, **kwargs)
    with pytest.raises(RuntimeError, match="q: must not require a gradient, there is none"):
        spec.forward.run("tokenmill", raw)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["attention_row_scores", "attention_column_scores", "best_match"])
def test_constant_results_do_not_require_a_gradient(name, backend):
    spec = registry.get(name)
    args, kwargs = draw(spec)
    args = [x.requires_grad_() if is_float(x) else x for x in args]
    results = as_tuple(spec.function(*args, **kwargs, backend=backend))
    assert not any(r.requires_grad for r in results)


def test_class_token_scores_keep_their_gradient_under_vmap():
    q, k = torch.randn(2, 1, 5, 2, 4), torch.randn(2, 1, 5, 2, 4)

    def total(q):
        return tm.nn.class_token.class_scores(q, k[0]).square().sum()

    found = torch.func.grad(lambda q: torch.vmap(total)(q).sum())(q)
    q.requires_grad_()
    (want,) = torch.autograd.grad(sum(map(total, q)), q)
    torch.testing.assert_close(found, want)
