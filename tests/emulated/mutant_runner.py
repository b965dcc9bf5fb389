"""Runs operators on mutants of the emulated library, each in a process of its own.

Reads mutations as JSON rows [kernel, kind, seed] from standard input and prints an object for each:
verdict (survived, wrong, report, hang), the change, and the report. The kind "original" changes
nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ptxvm.mutate import Change, Mutation, mutate, sections

import tokenmill as tm
from tokenmill import _emulator
from tokenmill._call import library
from tokenmill.dense.attention_decode_cases import decode_call
from tokenmill.sparse.block_sparse_attention_cases import block_sparse_call

Tensors = list[torch.Tensor]
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "f": torch.float32}
SECONDS, CLOCK = 60, 600  # processor time, and wall time after which a wait counts as a hang
PACKED = [3, 0, 70, 1, 129, 64, 17] * 6  # lengths of sequences
FRONT, BEHIND = 5, 150  # padding tokens that belong to no sequence


INF, NAN = torch.inf, torch.nan
VALUES = {torch.float32: (NAN,) * 3} | dict.fromkeys(
    (torch.float16, torch.bfloat16), (INF, -INF, NAN)
)


def spoil(v: torch.Tensor, random: torch.Generator) -> None:
    """Makes one value of each column of [batch, keys, heads, columns] infinite or NaN."""
    batch, keys, heads, columns = v.shape
    key = torch.randint(keys, (batch, 1, heads, columns), generator=random)
    kind = torch.randint(3, key.shape, generator=random)
    v.scatter_(1, key, torch.tensor(VALUES[v.dtype])[kind].to(v.dtype))


def merge_case(dtype: torch.dtype, dim: int, parts: int, lses: bool) -> Callable[[str], Tensors]:
    """Forward and backward; the dimension decides between vectorised and scalar accesses."""
    random = torch.Generator().manual_seed(parts)
    outs = torch.randn(parts, 2, 5, 2, dim, generator=random).to(dtype)
    weights = torch.randn(parts, 2, 2, 5, generator=random) * 3
    weights[0, 0] = -torch.inf
    weights[:, 1, 1, 4] = -torch.inf
    dout = torch.randn(2, 5, 2, dim, generator=random).to(dtype)
    dlse = torch.randn(2, 2, 5, generator=random)

    def run(backend: str) -> Tensors:
        wide = backend == "reference"
        x = (outs.double() if wide else outs).clone().requires_grad_()
        w = (weights.double() if wide else weights).clone().requires_grad_() if lses else None
        out, lse = tm.merge_attention_states(x, w, backend=backend)
        results = [out.detach(), lse.detach()] if lses else [out.detach()]
        losses = [out, lse] if lses else [out]
        grads = [dout, dlse] if lses else [dout]
        finite = [torch.where(torch.isfinite(y), y, 0.0) if y is not out else y for y in losses]
        torch.autograd.backward(finite, [g.to(y.dtype) for g, y in zip(grads, finite, strict=True)])
        results += [t.grad for t in (x, w) if t is not None and t.grad is not None]
        return results

    return run


def attention_case(
    dtype: torch.dtype,
    queries: int,
    keys: int,
    dims: tuple[int, int],
    gradients: bool = False,
    finite: bool = True,
    heads: int = 4,
    **options: Any,
) -> Callable[[str], Tensors]:
    """Query heads share two KV heads; dims: head_dim of keys and of values."""
    random = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(2, queries, heads, dims[0], generator=random).to(dtype)
    k = torch.randn(2, keys, 2, dims[0], generator=random).to(dtype)
    v = torch.randn(2, keys, 2, dims[1], generator=random).to(dtype)
    dout = torch.randn(2, queries, heads, dims[1], generator=random).to(dtype)
    dlse = torch.randn(2, heads, queries, generator=random)
    # Scores grow along the keys, so that row_max rises for many tiles.
    k *= torch.linspace(0.1, 1, keys)[:, None, None].to(dtype)
    if not finite:  # sums of rounded parts turn infinities into NaN in float32
        spoil(v, random)

    def run(backend: str) -> Tensors:
        wide = backend == "reference"
        inputs = [(x.double() if wide else x).clone().requires_grad_() for x in (q, k, v)]
        results = tm.attention(*inputs, return_lse=True, backend=backend, **options)
        if not gradients:
            return [x.detach() for x in results]
        torch.autograd.backward(results, [dout.to(results[0].dtype), dlse.to(results[1].dtype)])
        return [x.grad for x in inputs if x.grad is not None]

    return run


def packed_attention_case(
    dtype: torch.dtype, lengths: list[int], dim: int, gradients: bool = False
) -> Callable[[str], Tensors]:
    """Packed sequences; key lengths are in reverse order. Padding tokens lie before and after them;
    the reference does not get these."""
    random = torch.Generator().manual_seed(dim)
    ends = [torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, lengths[::-1])]
    tokens = int(ends[0][-1])
    q = torch.randn(FRONT + tokens + BEHIND, 4, dim, generator=random).to(dtype)
    k, v = (torch.randn(len(q), 2, dim, generator=random).to(dtype) for _ in range(2))
    dout = torch.randn(q.shape, generator=random).to(dtype)
    inside = slice(FRONT, FRONT + tokens)

    def around(x: torch.Tensor, none: float = 0) -> torch.Tensor:
        return torch.nn.functional.pad(x, (FRONT, BEHIND), value=none)

    def run(backend: str) -> Tensors:
        wide = backend == "reference"
        given = [x[inside].double() if wide else x for x in (q, k, v, dout)]
        inputs = [x.clone().requires_grad_() for x in given[:3]]
        first = 0 if wide else FRONT
        results = tm.attention(
            *inputs,
            return_lse=True,
            backend=backend,
            cu_seqlens_q=ends[0] + first,
            cu_seqlens_k=ends[1] + first,
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(lengths),
        )
        if gradients:
            torch.autograd.backward(results[0], given[3])
            found = [x.grad for x in inputs if x.grad is not None]
        else:
            found = [results[0].detach(), results[1].detach()]
        if not wide:
            return found
        rows = [around(x.movedim(0, -1)).movedim(-1, 0) for x in found if x.dim() == 3]
        return rows + [around(x, -torch.inf) for x in found if x.dim() == 2]

    return run


def call_case(
    op: str,
    make: Callable[..., Any],
    dtype: torch.dtype = torch.float32,
    gradients: bool = False,
    finite: bool = True,
) -> Callable[[str], Tensors]:
    """Calls an operator with the arguments of one of its samples: its results, or gradients of q, k
    and v."""
    random = torch.Generator().manual_seed(0)
    args, kwargs = make(dtype, random)
    if not finite:
        spoil(args[2], random)

    def run(backend: str) -> Tensors:
        def given(value: Any) -> Any:
            is_wide = backend == "reference" and isinstance(value, torch.Tensor)
            return value.double() if is_wide and value.is_floating_point() else value

        inputs = [*map(given, args)]
        if gradients:
            inputs[:3] = (x.clone().requires_grad_() for x in inputs[:3])
        found = getattr(tm, op)(
            *inputs, **{k: given(v) for k, v in kwargs.items()}, backend=backend
        )
        results = list(found) if isinstance(found, tuple) else [found]
        if not gradients:
            return results
        again = torch.Generator().manual_seed(1)
        dout = torch.randn(results[0].shape, generator=again).to(dtype)
        results[0].backward(dout.to(results[0].dtype))
        return [x.grad for x in inputs[:3]]

    return run


def topk_call(dtype: torch.dtype, g: torch.Generator) -> Any:
    """One row for all SMs."""
    return (torch.randint(5000, (1, 40001), generator=g).to(dtype), 700), {}


def recurrence_call(dtype: torch.dtype, g: torch.Generator) -> Any:
    """Parts of one sequence, one per block, which pass on their state."""
    q, k, v = (torch.randn(1, 700, 2, d, generator=g).to(dtype) for d in (12, 12, 20))
    decay = torch.tensor([-0.01, -0.2])
    return (q, k, v), {"log_decay": decay, "return_final_state": True}


def chunks_call(s: int, heads: int, **options: Any) -> Callable[..., Any]:
    """Chunks of linear attention, with 128 features and columns."""

    def make(dtype: torch.dtype, g: torch.Generator) -> Any:
        q, k, v = (torch.randn(1, s, heads, 128, generator=g).to(dtype) for _ in range(3))
        state = torch.randn(1, heads, 128, 128, generator=g)
        decay = torch.linspace(-0.2, -0.01, heads)
        return (q, k, v), {"log_decay": decay, "initial_state": state} | options

    return make


def packed_chunks_call(dtype: torch.dtype, g: torch.Generator) -> Any:
    """Sequences that end inside a chunk."""
    q, k, v = (torch.randn(400, 1, 128, generator=g).to(dtype) for _ in range(3))
    return (q, k, v), {
        "log_decay": torch.tensor([-0.1]),
        "cu_seqlens": torch.tensor([0, 330, 400]).int(),
    }


# The first call has values that are not finite, which take a path of their own in the forward. The
# second refills stages with sink keys, listed blocks and recent keys, and leaves one warpgroup
# without rows. In the third, requests of two heads end inside a tile.
BLOCK_SPARSE_CALLS: tuple[dict[str, Any], ...] = (
    {"sq": 250, "sk": 330, "causal": True, "num_sink": 20, "num_recent": 70},
    {"sq": 192, "sk": 640, "block_q": 128, "causal": True, "num_sink": 330, "num_recent": 70},
    {"b": 2, "sq": 330, "sk": 330, "h": 2, "num_sink": 70}
    | {"ends_q": (300, 400), "ends_k": (330, 500)},
)


CALLS = {
    "topk_": ("topk_select", topk_call),
    "23attention_decode_kernel": (
        "attention_decode",
        decode_call((300, 1, 900), 1, 8, 2, 64, 64, None, 1024, schedule="stream_k"),
    ),
    "recurrence_kernel": ("linear_attention", recurrence_call),
}


# Kernels of compute capability 9.0 must be right in each of these modes, equal to MODES of
# tests/sm90.py.
SM90_MODES = (
    "async=latest",
    "async=earliest,order=reverse",
    "async=seed:1,order=seeded,fuel=300",
)


def on_sm90(*calls: Callable[[str], Tensors]) -> Iterator[Callable[[str], Tensors]]:
    for call in map(functools.cache, calls):
        for mode in SM90_MODES:

            def run(backend: str, call: Any = call, mode: str = mode) -> Tensors:
                if backend == "reference":
                    return call(backend)
                with _emulator.configured(f"device=sm_90a,{mode}"):
                    return call.__wrapped__(backend)

            yield run


def cases(kernel: str) -> Iterator[Callable[[str], Tensors]]:
    """Cases that exercise a kernel, given its mangled name; short calls first, which find most
    faults."""
    element = r"I(?:\d+_*(?:nv_)?)?(half|bfloat16|f)L"
    if found := re.search(f"merge_(backward_)?kernel{element}i(\\d)", kernel):
        dtype = DTYPES[found[2]]
        # Loops are unrolled by 4: one iteration or many, with 0 to 3 left over.
        short, long = (40, 1416) if found[3] != "1" else (21, 333)
        sizes = ((short, 3, True), (long, 4, True), (short, 203, True), (long, 6, False))
        for dim, parts, lses in sizes:
            yield merge_case(dtype, dim, parts, lses)
    elif found := re.search(f"attention_forward_sm90_kernel{element}i(\\d+)E", kernel):
        dtype, dim = DTYPES[found[1]], int(found[2])
        yield from on_sm90(
            attention_case(dtype, 200, 640, (dim, dim), window=(500, 0)),
            attention_case(dtype, 200, 1024, (dim, dim)),
            attention_case(dtype, 150, 278, (dim, dim), finite=False, causal=True),
            packed_attention_case(dtype, PACKED[:7], dim),
        )
    elif found := re.search(f"attention_backward_sm90_kernel{element}i(\\d+)E", kernel):
        dtype, dim = DTYPES[found[1]], int(found[2])
        yield from on_sm90(
            attention_case(dtype, 128, 256, (dim, dim), True),
            attention_case(dtype, 200, 300, (dim, dim), True, window=(150, 40)),
            packed_attention_case(dtype, PACKED[:7], dim, True),
            attention_case(dtype, 384, 256, (dim, dim), True),
            attention_case(dtype, 40, 64, (dim, dim), True, heads=2),  # one tile
        )
    elif found := re.search(f"block_sparse_(\\w+)_sm90_kernel{element}i(\\d+)E", kernel):
        dtype, dim, op = DTYPES[found[2]], int(found[3]), "block_sparse_attention"
        gradients = found[1] != "forward"
        options = {"b": 1, "h": 1, "hk": 1, "lists": 1, "entries": 10, "d": dim, "dv": dim}
        options |= {"block_q": 64, "block_k": 64}
        short, *long = (block_sparse_call(**options | given) for given in BLOCK_SPARSE_CALLS)
        yield from on_sm90(
            call_case(op, short, dtype, gradients, finite=gradients),
            *(call_case(op, call, dtype, gradients) for call in long),
        )
    elif found := re.search(f"recurrence_sm90_kernel{element}i128E", kernel):
        dtype, op = DTYPES[found[1]], "linear_attention"
        yield from on_sm90(
            call_case(op, chunks_call(450, 2), dtype),
            call_case(op, chunks_call(1000, 1), dtype),
            call_case(op, packed_chunks_call, dtype),
        )
    elif found := re.search(f"attention_forward_kernel{element}i(\\d+)E", kernel):
        dtype, dim = DTYPES[found[1]], int(found[2])
        yield attention_case(dtype, 33, 65, (dim - 31, dim - 3))
        yield attention_case(dtype, 33, 65, (dim, 17))
        yield attention_case(dtype, 33, 65, (dim - 25, 9))
        yield attention_case(dtype, 33, 65, (dim - 6, 7))
        yield attention_case(dtype, 70, 129, (dim - 8, dim), scale=3.0, causal=True)
        yield attention_case(dtype, 90, 60, (dim, dim), causal=True, sink=torch.linspace(-2, 3, 4))
        yield attention_case(dtype, 100, 256, (dim, dim), scale=2.0)
        yield attention_case(dtype, 200, 333, (dim, dim), causal=True)
        yield attention_case(dtype, 300, 300, (dim, dim), window=(70, 20), scale=1.0)
        yield packed_attention_case(dtype, PACKED, dim)
        yield attention_case(dtype, 200, 222, (dim, dim), finite=False, causal=True)
        yield attention_case(dtype, 150, 150, (dim, dim), finite=False, window=(40, 20))
    elif found := re.search(f"backward_kernel{element}i(\\d+)E", kernel):
        dtype, dim = DTYPES[found[1]], int(found[2])
        yield attention_case(dtype, 70, 129, (dim - 31, dim - 3), True, causal=True)
        yield attention_case(dtype, 100, 256, (dim, dim), True, scale=1.0)
        yield attention_case(dtype, 200, 333, (dim, dim), True, causal=True)
        yield attention_case(dtype, 300, 200, (dim - 8, dim), True, window=(70, 20))
        yield packed_attention_case(dtype, PACKED, dim, True)
    elif found := next((call for name, call in CALLS.items() if name in kernel), None):
        yield call_case(*found)
    else:
        raise LookupError(f"no case for kernel {kernel}")


def wrong(got: Tensors, wanted: Tensors) -> str:
    """Rounding of f32 accumulates over a row; rounding to halves happens once, at the end."""
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        eps = torch.finfo(g.dtype).eps if g.is_floating_point() else 0
        allowed = (64 if g.dtype is torch.float32 else 2) * eps * w[torch.isfinite(w)].abs().max()
        same = (g.double() == w) | ((g.double() - w).abs() <= allowed) | (g.isnan() & w.isnan())
        if not same.all():
            return f"result {i}: {int((~same).sum())} of {g.numel()} elements"
    return ""


def judge(kernel: str, wanted: list[Tensors]) -> tuple[str, str]:
    for run, expected in zip(cases(kernel), wanted, strict=True):
        try:
            got = run("emulated")
        except RuntimeError as error:
            return "report", str(error).splitlines()[0]
        if difference := wrong(got, expected):
            return "wrong", difference
    return "survived", ""


def judge_original(kernel: str, wanted: list[Tensors]) -> tuple[str, str]:
    """Like judge; also requires that the cases launch the kernel."""
    with _emulator.counting() as launches:
        verdict = judge(kernel, wanted)
    launched = any(kernel in launch["kernel"] for launch in launches)
    return verdict if launched else ("wrong", "the kernel was not launched")


class Library:
    """A copy of the emulated library, in which one PTX text at a time is replaced."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "_emulated.so"
        shutil.copyfile(library.EMULATED_PATH, self.path)
        self.texts = list(sections(self.path.read_bytes()))

    @contextlib.contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[Change]:
        start, text = next((s, t) for s, t in self.texts if mutation.kernel in t)
        new, change = mutate(text, mutation)
        self._write(start, new)
        try:
            yield change
        finally:
            self._write(start, text)

    def _write(self, start: int, text: str) -> None:
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(text.encode("latin1"))


def in_child(path: Path, work: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """Verdict of a process that loads the library at `path`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        library.EMULATED_PATH = path
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, CLOCK)
        try:
            _emulator.configure("check=1,proxy=strict,watchdog=20")
            verdict = work()
        except BaseException as error:  # report every error to the parent
            verdict = ("error", repr(error))
        os.write(writing, json.dumps(verdict).encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        verdict, detail = json.loads(answer)
        return verdict, detail
    ends = (signal.SIGPROF, signal.SIGALRM)
    timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) in ends
    return ("hang", "") if timed_out else ("crash", f"status {status}")


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    references: dict[str, list[Tensors]] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = Library(folder)
        for row in json.load(sys.stdin):
            mutation = Mutation(*row)
            started = time.monotonic()
            if mutation.kernel not in references:
                references[mutation.kernel] = [run("reference") for run in cases(mutation.kernel)]
            original = mutation.kind == "original"
            look = functools.partial(
                judge_original if original else judge, mutation.kernel, references[mutation.kernel]
            )
            same = contextlib.nullcontext(Change(0, "", ""))
            with same if original else library.mutated(mutation) as change:
                verdict, detail = in_child(library.path, look)
            answer: dict[str, Any] = {
                "mutation": row,
                "verdict": verdict,
                "detail": detail,
                "line": change.line,
                "before": change.before,
                "after": change.after,
                "seconds": round(time.monotonic() - started, 2),
            }
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
