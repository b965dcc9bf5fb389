"""Requirements for every operator on every backend, derived from the registry."""

from __future__ import annotations

import copy
import doctest
import inspect
import re
from contextlib import nullcontext

import malformed
import numpy as np
import pytest
import torch
from conftest import backends, cpu_variants, device_of
from hypothesis import given
from hypothesis import strategies as st
from options import pairwise_samples
from tier import examples
from torch.utils._python_dispatch import TorchDispatchMode

import tokenmill as tm
from tokenmill import _explain, registry
from tokenmill._call import choose, library
from tokenmill.testing import map_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAMPLES = [(spec, sample) for spec in registry.ops().values() for sample in spec.samples]
SPECS = list(registry.ops().values())
MALFORMED = [(spec, bad) for spec in SPECS for bad in malformed.calls(spec)]

each_sample = pytest.mark.parametrize(
    ("spec", "sample"), SAMPLES, ids=[f"{spec.name}-{sample.name}" for spec, sample in SAMPLES]
)
each_spec = pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])

INTERPRETERS = [b for b in ("triton", "emulated") if device_of(b) == "cpu"]
# Programs run serially: only the launcher's use of the number of threads could differ.
SERIAL = [b for b in INTERPRETERS if b == "triton"]


def each_call(few=(), without=(), others=(), of=lambda op: registry.get(op).samples):
    """Each sample `of` an operator on each backend; backends in `few` take only the first sample,
    where the tested property is the same for all backends."""
    return pytest.mark.parametrize(
        ("spec", "sample", "backend"),
        [
            pytest.param(spec, sample, backend, id=f"{spec.name}-{sample.name}-{backend}")
            for spec in SPECS
            for sample in of(spec.name)
            for backend in backends(*others)
            if backend not in without and (backend not in few or sample == spec.samples[0])
            if _explain.able(spec, sample, backend)
        ],
    )


def draw(sample, dtype=torch.float32, seed=0):
    return sample.make(dtype, torch.Generator().manual_seed(seed))


def outputs(result):
    return tuple(tm.testing.tensors_of(result))


def clean(spec, backend=None):
    """The public function, applied to copies of arguments that it writes into."""
    return tm.testing.without_side_effects(
        spec, lambda *args, **kwargs: spec.function(*args, backend=backend, **kwargs)
    )


def equal(x, y):
    """Equality with NaN as 0; float8, which PyTorch does not compare, by its bytes."""
    if x.dtype == y.dtype == torch.float8_e4m3fn:
        x, y = x.view(torch.uint8), y.view(torch.uint8)
    return torch.equal(x.nan_to_num(), y.nan_to_num())


def same_bits(a, b):
    return all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("spec", "sample", "dtype", "backend", "isa"),
    [
        pytest.param(
            *(spec, sample, dtype, backend, isa),
            id=f"{spec.name}-{sample.name}-{dtype}-{backend}-{isa}",
        )
        for spec, sample in SAMPLES
        for dtype in DTYPES
        for backend, isa in cpu_variants()
        # A serial interpreter runs the same programs in any dtype.
        if backend not in SERIAL or dtype == torch.float32 or sample in spec.samples[:2]
        if not _explain.missing(spec, sample, backend)
    ],
    indirect=["isa"],
)
def test_results_and_gradients_keep_the_error_budget(spec, sample, dtype, backend, isa):
    found = tm.testing.compare(spec, sample, backend, dtype, device=device_of(backend))
    assert found
    assert not [c for c in found if not c.ok]


@pytest.mark.parametrize(
    ("spec", "sample"),
    [(spec, s) for spec in SPECS for s in pairwise_samples(spec.name) if spec.gradients_of(s)],
    ids=lambda x: x.name,
)
def test_reference_gradcheck(spec, sample):
    args, kwargs = tm.testing.convert(draw(sample), torch.float64)
    shrunk = map_tensors((args, kwargs), lambda t: t)
    leaves = []

    def leaf(t):
        if t.is_floating_point():
            leaves.append(t.requires_grad_())
        return t

    args, kwargs = map_tensors(shrunk, leaf)

    def run(*_):
        result = outputs(spec.function(*args, backend="reference", **kwargs))
        # The log-sum-exp of nothing is -inf for every nearby input.
        return tuple(torch.where(torch.isinf(r), 0.0, r) for r in result)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@each_call(few=SERIAL, others=("reference",))
def test_strides_and_inputs_are_respected(spec, sample, backend):
    args, kwargs = draw(sample)
    device = device_of(backend)
    args, kwargs = map_tensors((args, kwargs), lambda t: t.to(device))
    before = copy.deepcopy((args, kwargs))
    result = outputs(clean(spec, backend)(*args, **kwargs))
    for old, new in zip(tensors(before), tensors((args, kwargs)), strict=True):
        assert equal(old, new)
    for r in result:
        assert all(r.data_ptr() != t.data_ptr() for t in tensors((args, kwargs)) if t.numel())

    def scatter(t):  # same values, every stride but the last one odd
        if t.dim() < 2:
            return t
        if any(t is w for w in written):  # the rows of a state are contiguous
            return t.new_zeros(t.shape[0], t.shape[1] + 2, *t.shape[2:])[:, 1:-1].copy_(t)
        wide = t.new_zeros(*(2 * n + 1 for n in t.shape[:-1]), t.shape[-1] + 3)
        view = wide[tuple(slice(1, 2 * n, 2) for n in t.shape[:-1])][..., 2 : 2 + t.shape[-1]]
        view.copy_(t)
        return view

    names = inspect.signature(spec.function).parameters
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    written = [given.get(name) for name in spec.written]
    spread_args, spread_kwargs = map_tensors((args, kwargs), scatter)
    spread = outputs(clean(spec, backend)(*spread_args, **spread_kwargs))
    if backend == "reference":  # BLAS sums in another order at other strides
        for r, s in zip(result, spread, strict=True):
            torch.testing.assert_close(r, s, equal_nan=True)
    else:
        assert same_bits(result, spread)


def tensors(tree):
    found = []
    map_tensors(tree, lambda t: found.append(t) or t)
    return found


# The PTX machine has no threads; tests/test_gpu.py compares its orders of warps and CTAs.
@each_call(few=SERIAL, without=("emulated",))
def test_same_bits_for_any_thread_count_and_run(spec, sample, backend, threads):
    args, kwargs = map_tensors(draw(sample), lambda t: t.to(device_of(backend)))
    cotangents = [torch.ones_like(o) for o in outputs(clean(spec)(*args, **kwargs))]
    cotangents = [c for c in cotangents if c.shape != (0,)] if spec.gradients_of(sample) else None

    def run():
        found = tm.testing.evaluate(clean(spec, backend), args, kwargs, cotangents)
        return [*found[0], *found[1]]

    threads(1)
    first = run()
    for count in (2,) if backend in SERIAL else (1, 2, 5):
        threads(count)
        assert same_bits(first, run())


def as_call(op, values):
    """The arguments of torch.ops, by position and by name."""
    return op.call(lambda *args, **kwargs: (args, kwargs), values)


# Backends share the fakes, the schema and the autograd; test_strides_and_inputs_are_respected shows
# that each backend leaves its inputs as they are.
@each_call(few=INTERPRETERS)
def test_opcheck(spec, sample, backend):
    args, kwargs = map_tensors(draw(sample), lambda t: t.to(device_of(backend)))
    lowered = spec.lower(*args, **kwargs)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if any(isinstance(t, torch.Tensor) and t.dtype == torch.float8_e4m3fn for t in lowered):
        checks.remove("test_schema")  # its tolerance comparison does not support float8
    # Backends share the fakes and the autograd from which graphs are made.
    first = sample == spec.samples[0]
    if first or (backend not in INTERPRETERS and sample in pairwise_samples(spec.name)):
        checks.append("test_aot_dispatch_dynamic")
    if spec.out and spec.out.has_native("CPU") and backend == "cpu":
        out = torch.zeros_like(outputs(spec.function(*args, **kwargs))[0])
        call = as_call(spec.out, (*lowered, out))
        op = spec.out.overload(choose.namespace(backend))
        of_out = checks if first else [c for c in checks if c != "test_aot_dispatch_dynamic"]
        torch.library.opcheck(op, *call, test_utils=of_out, raise_exception=True)
    lowered = [
        t.requires_grad_(bool(spec.gradients_of(sample)))
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
        for t in lowered
    ]
    op = spec.forward.overload(choose.namespace(backend))
    call = as_call(spec.forward, lowered)
    torch.library.opcheck(op, *call, test_utils=checks, raise_exception=True)
    if backend == "cpu" and spec.backward and spec.gradients_of(sample):
        lowered = backward_arguments(spec, lowered)
        op, call = spec.backward.overload(), as_call(spec.backward, lowered)
        torch.library.opcheck(op, *call, test_utils="test_faketensor", raise_exception=True)


# Backends share graphs; test_opcheck covers AOT autograd of the other samples.
@each_call(few=INTERPRETERS, of=pairwise_samples)
def test_compiles_as_one_graph(spec, sample, backend):
    args, kwargs = map_tensors(draw(sample), lambda t: t.to(device_of(backend)))
    torch._dynamo.reset()
    compiled = torch.compile(
        clean(spec, backend),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager" if sample == spec.samples[0] else "eager",
    )
    want = outputs(clean(spec, backend)(*args, **kwargs))
    assert same_bits(want, outputs(compiled(*args, **kwargs)))


FIRST_RULE = {spec.name: (spec, bad) for spec, bad in reversed(MALFORMED) if not bad.values}


@pytest.mark.parametrize(("spec", "bad"), FIRST_RULE.values(), ids=FIRST_RULE)
def test_bad_input_of_the_reference_is_refused_in_a_graph(spec, bad):
    args, kwargs = bad(spec, *draw(spec.samples[0]))
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=re.escape(f"tokenmill.{spec.name}: {bad.error}")):
        compiled(*args, backend="reference", **kwargs)


@each_spec
def test_exports(spec):
    for sample in spec.samples[:2]:
        args, kwargs = draw(sample)

        class Module(torch.nn.Module):
            def forward(self, *args, **kwargs):
                return spec.function(*args, **kwargs)

        exported = torch.export.export(Module(), args, kwargs)
        targets = [str(n.target) for n in exported.graph.nodes]
        assert any(t.startswith(f"{library.NAMESPACE}.{spec.name}") for t in targets)
        want = outputs(clean(spec)(*args, **kwargs))
        run = tm.testing.without_side_effects(spec, exported.module())
        assert same_bits(want, outputs(run(*args, **kwargs)))


@pytest.mark.parametrize(
    ("spec", "bad"), MALFORMED, ids=[f"{spec.name}-{bad.error}" for spec, bad in MALFORMED]
)
def test_bad_input_is_refused_in_the_same_words_everywhere(spec, bad):
    args, kwargs = bad(spec, *draw(spec.samples[0]))
    said = {}
    for backend in ("reference", *backends()):
        if bad.values and backend not in ("cpu", "reference"):
            continue  # values never cost the other backends a synchronization
        device = device_of(backend)
        moved = [a.to(device) if isinstance(a, torch.Tensor) and not a.is_meta else a for a in args]
        with pytest.raises(RuntimeError) as info:
            spec.function(*moved, backend=backend, **kwargs)
        said[backend] = str(info.value)
    assert len(set(said.values())) == 1, said
    message = said["reference"]
    assert message.startswith(f"tokenmill.{spec.name}: {bad.error}")
    assert re.fullmatch(r"tokenmill\.\w+: \w+: .*; got .*", message)
    explained = tm.explain(spec.name, *args, **kwargs)
    assert bad.values or (explained.backend is None and explained.error == message)


@pytest.mark.parametrize(
    ("spec", "bad", "backend"),
    [
        pytest.param(spec, bad, backend, id=f"{spec.name}-{bad.error}-{backend}")
        for spec, bad in MALFORMED
        if bad.values
        for backend in backends()
        if backend != "cpu" and _explain.able(spec, spec.samples[0], backend)
    ],
)
def test_bad_values_stay_in_bounds_and_are_refused_on_request(spec, bad, backend, monkeypatch):
    args, kwargs = bad(spec, *draw(spec.samples[0]))
    args, kwargs = map_tensors((args, kwargs), lambda t: t.to(device_of(backend)))
    with tm._emulator.reporting() if backend == "emulated" else nullcontext([]) as reports:
        spec.function(*args, backend=backend, **kwargs)
    assert all("race: " in r.report and "slot" in bad.error for r in reports)  # of two CTAs
    monkeypatch.setenv("TOKENMILL_CHECK", "1")
    with pytest.raises(RuntimeError, match=re.escape(bad.error)):
        spec.function(*args, backend=backend, **kwargs)


GPU = ("cuda", "triton")  # a crash there would take the device from later tests
HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, -(2**31) - 1, 2**40, 2**62, -(2**63), 2**64, 10**400]),
    st.sampled_from([0.5, float("nan"), float("inf"), 1e300, 1j]),
    st.sampled_from(["nonsense", "", b"bytes", (), [], {}, [[1], [2, [3]]], (1, None), ("a", "b")]),
    st.sampled_from([object(), int, torch.float32, np.int64(2), np.float32(0.5), np.zeros(3)]),
    st.builds(
        lambda shape, dtype: torch.zeros(shape).to(dtype),
        st.lists(st.sampled_from([0, 1, 2, 3, 33]), max_size=5),
        st.sampled_from(
            [
                torch.float32,
                torch.float16,
                torch.int32,
                torch.int64,
                torch.bool,
                torch.complex64,
                torch.float8_e4m3fn,
            ]
        ),
    ),
    st.builds(lambda: torch.zeros(2, 3).to_sparse()),
    st.builds(lambda: torch.zeros(2, 3, 4, 8, device="meta")),
    st.builds(lambda: [torch.zeros(2, 3), None]),
)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b not in GPU])
@each_spec
@examples(150)
@given(data=st.data())
def test_no_argument_crashes(spec, backend, data):
    """For any argument, the call returns or raises an error of this package."""
    sample = data.draw(st.sampled_from(spec.samples))
    args, kwargs = draw(sample)
    args = list(args)
    names = list(inspect.signature(spec.function).parameters)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(names))
        value = data.draw(HOSTILE)
        if name in names[: len(args)]:
            args[names.index(name)] = value
        elif name != "backend":
            kwargs[name] = value
    try:
        spec.function(*args, backend=backend, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        assert str(error).startswith("tokenmill."), error


def each_raw(backends):
    """Each operator on each of the backends that have kernels of it."""
    return pytest.mark.parametrize(
        ("spec", "backend"),
        [
            pytest.param(spec, backend, id=f"{spec.name}-{backend}")
            for spec in SPECS
            for backend in backends
            if _explain.able(spec, spec.samples[0], backend)
        ],
    )


@each_raw([b for b in backends() if b not in GPU])
def test_raw_operator_refuses_lowered_nonsense(spec, backend):
    """torch.ops bypasses the Python checks: the native kernels check by themselves."""
    args, kwargs = draw(spec.samples[0])
    lowered = list(spec.lower(*args, **kwargs))
    for i, value in enumerate(lowered):
        if not isinstance(value, torch.Tensor):
            continue
        for bad in (value.double(), value[None, None]):
            edited = [*lowered[:i], bad, *lowered[i + 1 :]]
            with pytest.raises(RuntimeError, match=rf"tokenmill\.{spec.name}") as native:
                spec.forward.run(choose.namespace(backend), edited)
            with pytest.raises(RuntimeError) as python:
                spec.forward.check(*edited)
            assert str(native.value) == str(python.value)


@each_raw(backends())
def test_raw_operator_names_the_tensor_that_is_missing(spec, backend):
    """torch passes None for any tensor."""
    args, kwargs = map_tensors(draw(spec.samples[0]), lambda t: t.to(device_of(backend)))
    lowered = spec.lower(*args, **kwargs)
    required = [name for name in spec.forward.arguments if name in spec.forward.tensors]
    for name in required if len(required) > 1 else ():
        at = spec.forward.arguments.index(name)
        rule = rf"^tokenmill\.{spec.name}: {name}: must be a tensor; got None$"
        edited = (*lowered[:at], None, *lowered[at + 1 :])
        with pytest.raises(RuntimeError, match=rule):
            spec.forward.run(choose.namespace(backend), edited)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16], ids=str
)
def test_kernels_name_dtypes_as_torch_does(dtype):
    x = torch.zeros(2, 3).to(dtype)
    for backend in ("cpu", "reference"):
        with pytest.raises(RuntimeError, match=f"or float32; got {str(dtype)[6:]}$"):
            tm.topk_select(x, 1, backend=backend)


@each_spec
def test_raw_operator_refuses_a_tensor_of_another_device(spec):
    """A meta tensor sends the call to the fake, whose results nobody writes."""
    args, kwargs = draw(spec.samples[0])
    for op in spec.torch_ops:
        lowered = spec.lower(*args, **kwargs)
        if op is spec.backward:
            lowered = backward_arguments(spec, lowered)
        tensors = [i for i, value in enumerate(lowered) if isinstance(value, torch.Tensor)]
        for i in tensors[1:]:
            edited = [*lowered[:i], lowered[i].to("meta"), *lowered[i + 1 :]]
            with pytest.raises(RuntimeError, match=r"\.\w+: \w+: must be on the device of"):
                op.run(library.NAMESPACE, edited)


def backward_arguments(spec, lowered):
    """Arguments that autograd passes to the backward of a call."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is spec.backward.overload():
                seen.extend(spec.backward.bind(args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    lowered = [t.requires_grad_() if is_float(t) else t for t in lowered]
    results = [r for r in outputs(spec.forward.run(library.NAMESPACE, lowered)) if r.requires_grad]
    with Record():
        torch.autograd.grad(results, list(filter(is_float, lowered)),
                            [torch.ones_like(r) for r in results], allow_unused=True)  # fmt: skip
    return [t.detach() if isinstance(t, torch.Tensor) else t for t in seen]


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@each_spec
def test_unknown_and_unable_backends_are_refused(spec):
    args, kwargs = draw(spec.samples[0])
    with pytest.raises(RuntimeError, match=r"backend: must be one of .*; got 'gpu'"):
        spec.function(*args, backend="gpu", **kwargs)
    if device_of("cuda") == "cpu":
        with pytest.raises(RuntimeError, match="'cuda' cannot run this call: the tensors are on"):
            spec.function(*args, backend="cuda", **kwargs)
    if not any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args):
        return
    wide = tm.testing.convert((args, kwargs), torch.float64)
    with pytest.raises(RuntimeError, match="float64 runs only on the reference"):
        spec.function(*wide[0], backend="cpu", **wide[1])
    assert tm.explain(spec.name, *wide[0], **wide[1]).backend == "reference"


@each_spec
def test_explain_names_kernel_and_reasons(spec):
    args, kwargs = draw(spec.samples[0])
    text = str(tm.explain(spec.name, *args, **kwargs))
    assert text.startswith(f"tokenmill.{spec.name}: cpu (csrc/{spec.family}/{spec.name}, ")
    assert "not cuda: the tensors are on cpu" in text
    assert "not reference: comes later" in text


@each_spec
def test_environment_chooses_the_backend(spec, monkeypatch):
    args, kwargs = draw(spec.samples[0])
    monkeypatch.setenv("TOKENMILL_BACKEND", "reference")
    assert tm.explain(spec.name, *args, **kwargs).backend == "reference"


@each_spec
def test_docstring_is_complete_and_its_example_runs(spec):
    doc = inspect.getdoc(spec.function)
    for section in ("Args:", "Returns:", "Raises:", "Complexity:", "Paper:", "Example:"):
        assert section in doc, section
    for name in inspect.signature(spec.function).parameters:
        assert re.search(rf"\b{name}\b", doc), name
    run_doctest(spec.function)


@pytest.mark.parametrize(
    "function",
    # The example of evaluate() needs weights: tests/test_pretrained.py runs it.
    [f for n in tm.__all__ if n != "evaluate" and inspect.isfunction(f := getattr(tm, n))]
    + [tm.testing.assert_accurate, tm.testing.cpu_isa],
    ids=lambda f: f.__name__,
)
def test_examples_run(function):
    run_doctest(function)


def run_doctest(function):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    found = finder.find(function, function.__name__, globs={"torch": torch, "tm": tm})
    assert any(test.examples for test in found)
    for test in found:
        assert runner.run(test).failed == 0


@each_spec
def test_every_backend_is_there(spec):
    """A missing backend is a row in `python -m tokenmill ops`."""
    keys = ["CPU"] if tm.backends()["cuda"] == "not in this build" else ["CPU", "CUDA"]
    for op in spec.torch_ops:
        assert op.triton
        assert all(op.has_native(key) for key in keys)
        assert op.has_emulated() == library.emulated_built()
