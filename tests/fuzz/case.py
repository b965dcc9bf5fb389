"""One call of the fuzzer: created from (seed, number), run, and judged."""

from __future__ import annotations

import functools
import gc
import random
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from fuzz.guard import End, Guard, tensors
from fuzz.mutate import is_extreme, mutate
from fuzz.targets import Arguments, NoCall, Target, targets

RULE = re.compile(
    r"tokenmill\.[\w.]+: [\w.]+: (.+; got .*|'\w+' cannot run this call: .+)", re.DOTALL
)
# Errors of Python on keywords, of PyTorch on its modes, and of its dispatcher on schema types.
KEYWORDS = re.compile(
    r"unexpected keyword argument|required (positional|keyword-only) argument"
    r"|multiple values for|positional arguments? but"
)
MODES = re.compile(
    r"^Inference tensors cannot be saved for backward|^Cannot set version_counter"
    r"|^Inplace update to inference tensor"
)
DISPATCHER = re.compile(
    r"tokenmill\w*::\w+\(\) |Could not run 'tokenmill\w*::|Overflow when unpacking|Unable to cast"
    r"|There were no tensor arguments to this function"
)
DEFECT = re.compile(r"INTERNAL ASSERT|aoti_torch_|torch_call_dispatcher|report a bug", re.I)
# The last two show a failed allocation, also in a thread, in the stable ABI of PyTorch.
MEMORY = re.compile(
    r"can't allocate memory|bad_alloc|out of memory|overflow|\"aten::\w*(empty|zeros|full)"
    r"|torch_parallel_for",
    re.I,
)


@dataclass(frozen=True)
class Case:
    """A call. make creates its arguments anew each time, as a call may write into them."""

    target: Target
    backend: str | None  # value of the backend argument
    words: str  # the call and its changes, in words
    make: Callable[[], Arguments]
    end: End | None  # the end of tensors at a guard page


@functools.lru_cache(maxsize=2)
def _targets(backend: str) -> list[Target]:
    return targets(backend)


def choose(seed: int, number: int, backend: str) -> Case:
    rng = random.Random(f"{seed}, {number}")
    target = rng.choice(_targets(backend))
    sample, donor = rng.choice(target.samples), rng.choice(target.samples)
    dtype = rng.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16))
    argument = None if backend == "cpu" and rng.random() < 0.3 else backend
    gradients = rng.random() < 0.2
    end: End | None = rng.choice(("front", "back", None)) if backend == "cpu" else None
    edits = rng.random()

    def make(words: list[str] | None = None) -> Arguments:
        torch.manual_seed(number)
        g = torch.Generator().manual_seed(number)
        arguments = target.arguments(sample, dtype, g)
        done = mutate(
            random.Random(edits), target.known, arguments, lambda: target.arguments(donor, dtype, g)
        )
        if words is not None:
            words += done
        return {k: _leaf(v, gradients) for k, v in arguments.items()}

    words: list[str] = []
    make(words)
    title = [sample.name, str(dtype)[6:], f"backend={argument}"]
    title += (["gradients"] if gradients else []) + ([f"guard page at the {end}"] if end else [])
    described = f"{target.name} ({', '.join(title)}): {'; '.join(words) or 'unchanged'}"
    return Case(target, argument, described, make, end)


def _leaf(value: Any, gradients: bool) -> Any:
    """A tensor that requires a gradient, if it did before an edit made it a view, or if
    `gradients`.
    """
    plain = isinstance(value, Tensor) and value.is_floating_point() and not value.is_inference()
    return (
        value.detach().requires_grad_() if plain and (gradients or value.requires_grad) else value
    )


def check(seed: int, number: int, backend: str, announce: Callable[[str], None]) -> tuple[str, str]:
    """Runs a call after announcing it: ("done", "refused", "none" or "wrong"; reason)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = choose(seed, number, backend)
        except NoCall:
            return "none", ""
        announce(case.words)
        with Guard(case.end) if case.end else nullcontext(lambda x: x) as guard:
            result = _judge(case, guard)
        gc.collect(0)
    return result


def _judge(case: Case, guard: Callable[[Arguments], Arguments]) -> tuple[str, str]:
    made = case.make()
    extreme = is_extreme(made)
    arguments = guard(made)
    try:
        results = _run(case, arguments, case.backend, poison=True)
    except Exception as error:
        if _is_race_for_values(error, case):
            return "refused", ""
        # A policy may have stored tokens in its cache before a step is refused.
        written = set() if case.target.compared or case.target.raw else set(case.target.written)
        wrong = (
            _wrong_error(error, case, extreme)
            or _changed(case, arguments, written)
            or _other_words(error, case, extreme)
        )
        return ("wrong", wrong) if wrong else ("refused", "")
    wrong = _changed(case, arguments, set(case.target.written))
    if not extreme:
        wrong = wrong or _second(case, results) or _unlike_reference(case, results)
    return ("wrong", wrong) if wrong else ("done", "")


def _is_race_for_values(error: Exception, case: Case) -> bool:
    """Whether blocks on the PTX machine race for a repeated slot, which the reference refuses: the
    values of tensors are not checked there.
    """
    if case.backend != "emulated" or ": race: " not in str(error) or not case.target.compared:
        return False
    return isinstance(_reference(case), Exception)


def _second(case: Case, results: list[Tensor]) -> str:
    try:
        again = _run(case, case.make(), case.backend, poison=False)
    except Exception as error:
        return f"the second call raises {_first_line(error)}"
    return _differ(results, again, bits=not case.target.products)


def _run(case: Case, arguments: Arguments, backend: str | None, *, poison: bool) -> list[Tensor]:
    """All tensors returned by a call, including gradients, and the tensors it has written.

    With poison, uninitialised memory holds NaN and the largest integers, otherwise its previous
    contents.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = poison  # type: ignore[attr-defined]
    torch.manual_seed(0)
    results = [*tensors(case.target.run(arguments, backend), records=True)]
    smooth = [r for r in results if r.requires_grad and r.grad_fn is not None]
    leaves = [t for t in tensors(arguments) if t.requires_grad and t.is_leaf]
    if leaves:
        ones = [torch.ones_like(r) for r in smooth]
        found = torch.autograd.grad(smooth, leaves, ones, allow_unused=True) if smooth else leaves
        pairs = zip(leaves, found, strict=True)
        results += [torch.zeros_like(x) if g is None or not smooth else g for x, g in pairs]
    return results + [t for name in case.target.written for t in tensors(arguments.get(name))]


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 400 else text[:397] + "..."


def _wrong_error(error: Exception, case: Case, extreme: bool) -> str:
    text = str(error)
    if extreme and (isinstance(error, MemoryError) or MEMORY.search(text)):
        return ""
    fine = (
        (isinstance(error, RuntimeError) and RULE.fullmatch(text))
        or (isinstance(error, TypeError) and KEYWORDS.search(text))
        or MODES.search(text)
        or (case.target.raw and DISPATCHER.search(text))
    )
    return "" if fine and not DEFECT.search(text) else _first_line(error)


def _changed(case: Case, arguments: Arguments, written: set[str]) -> str:
    """Whether the call wrote to an argument that it should not write."""
    fresh = case.make()
    # An operator refuses an argument that overlaps what it writes. A policy accepts one within its
    # cache: an earlier step may have written it before the argument is checked.
    memory = id if case.target.compared or case.target.raw else _storage
    owned = {memory(t) for name in written for t in tensors(arguments.get(name))}
    for name in arguments.keys() - written:
        for now, before in zip(tensors(arguments[name]), tensors(fresh[name]), strict=True):
            if memory(now) in owned:
                continue
            if not _same_bits(now, before):
                return f"{name} was written"
    return ""


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.is_meta or a.numel() == 0 or a.numel() > 2**26:
        return True
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(t: Tensor) -> Tensor:
    """[elements, bytes per element] of a copy with contiguous strides."""
    row = t.detach().resolve_neg().resolve_conj().reshape(-1)
    return row.new_empty(row.shape).copy_(row).view(torch.uint8).view(t.numel(), -1)


def _differ(first: list[Tensor], again: list[Tensor], *, bits: bool) -> str:
    if len(first) != len(again):
        return "two calls differ in the number of results"
    for i, (a, b) in enumerate(zip(first, again, strict=True)):
        alike = _same_bits(a, b) if bits else (a.shape, a.dtype) == (b.shape, b.dtype)
        if not alike:
            return f"result {i} differs from call to call: {_instance(a, b)}"
    return ""


def _instance(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta:
        return f"{a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}"
    other = (_bytes(a) != _bytes(b)).any(1)
    i = int(other.nonzero()[0])
    values = [t.detach().reshape(-1)[i].item() for t in (a, b)]
    return f"{int(other.sum())} of {a.numel()} elements, first {values[0]}, then {values[1]}"


def _reference(case: Case) -> list[Tensor] | Exception:
    arguments = case.make()
    arguments.pop("backend", None)
    try:
        return _run(case, arguments, "reference", poison=True)
    except Exception as error:
        return error


def _other_words(error: Exception, case: Case, extreme: bool) -> str:
    """Whether the reference refuses the call with a different message. Backends that do not check
    values inside tensors refuse less.
    """
    if not case.target.compared or extreme or "backend: " in str(error):
        return ""
    # an error of autograd, which the reference may not need for a call
    if MODES.search(str(error)):
        return ""
    # only the reference accepts float64
    if any(t.dtype == torch.float64 for t in tensors(case.make())):
        return ""
    there = _reference(case)
    if not isinstance(there, Exception):
        return f"the reference takes what is refused here: {_first_line(error)}"
    if str(there) != str(error):
        return f"{_first_line(error)}, but the reference says {_first_line(there)}"
    return ""


def _small(arguments: Arguments) -> bool:
    """Whether all numbers are finite and small enough that neither sums overflow, nor weights that
    a gradient recomputes from a rounded log-sum-exp (docs/numerics.md).
    """
    numbers = (x for x in arguments.values() if isinstance(x, Real) and not isinstance(x, Integral))
    return all(abs(float(x)) < 1e4 for x in numbers) and all(
        bool((t.abs() < 1e4).all())
        for t in tensors(arguments)
        if t.is_floating_point() and t.element_size() > 1 and not t.is_meta
    )


def _unlike_reference(case: Case, results: list[Tensor]) -> str:
    if not case.target.compared or "backend" in case.make():
        return ""
    wanted = _reference(case)
    if isinstance(wanted, Exception):
        if wrong := _wrong_error(wanted, case, False):
            return f"the reference: {wrong}"
        return "" if case.backend == "emulated" else f"the reference: {_first_line(wanted)}"
    if len(wanted) != len(results):
        return f"{len(results)} results, the reference has {len(wanted)}"
    small = _small(case.make())
    for i, (a, b) in enumerate(zip(results, wanted, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {_instance(a, b)} of the reference"
        if not small or a.is_meta or a.dtype != torch.float32:
            continue
        if not torch.equal(a.isnan(), b.isnan()):
            return f"result {i} has NaN where the reference has none, or the reverse"
    return ""
