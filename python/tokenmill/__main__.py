"""python -m tokenmill info | ops | explain | check | bench | bench primitives | bench report |
bench scale | tune | report | demo | evaluate | papers"""

from __future__ import annotations

import argparse
import errno
import os
import platform
import sys
from typing import Any

import torch

from . import _cli, _explain, _info, _self_check, registry
from ._call import choose
from ._check import InputError
from ._self_check import DTYPES
from ._version import __version__

BROKEN_PIPE = 128 + 13  # exit status of a program killed by SIGPIPE
INTERRUPTED = 128 + 2
TWO_WORDS = (["primitives"], ["report"], ["scale"])  # second words that may follow "bench"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a command found a failure, 2 if it could not run."""
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # swallows unflushed output
        if error.errno == errno.EPIPE:  # the reader has closed the pipe, like head
            return BROKEN_PIPE
        print(f"tokenmill: {error.strerror}", file=sys.stderr)
        return 1


def _run(argv: list[str] | None) -> int:
    command = "tokenmill"
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"] and argv[1:2] in TWO_WORDS:
        argv = [" ".join(argv[:2]), *argv[2:]]
    try:
        parser = _parser()
        if not argv:
            parser.print_help()
            return 0
        options, others = parser.parse_known_args(argv)
        command = f"tokenmill {options.command}"
        if others:
            raise _cli.UsageError(f"unrecognized arguments: {' '.join(others)}")
        status: int = options.run(options)
        return status
    except _cli.UsageError as error:
        print(f"{error.command or command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> _cli.Parser:
    parser = _cli.Parser(prog=_cli.PROGRAM, description="Look at, check and measure this build.")
    python = platform.python_version()
    version = f"tokenmill {__version__} (torch {torch.__version__}, Python {python})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        return sub

    command("info", run_info, "versions, compilers, instruction sets, GPUs, environment variables")
    command(
        "ops",
        run_ops,
        "every operator, the backends that it has in this build, and how DTensors split",
    )
    sub = command("explain", run_explain, "which kernel runs a call, and why the others do not")
    _add_explain_arguments(sub)
    sub = command(
        "check", _self_check.run, "every operator on this machine against the float64 oracle"
    )
    _self_check.add_arguments(sub)
    from .bench import run as bench

    sub = command("bench", bench.run, "named cases against named peers, in one process")
    bench.add_arguments(sub)
    from .bench import primitives

    sub = command(
        "bench primitives",
        primitives.run,
        "the ceilings of this machine: rates, memories, latencies",
    )
    primitives.add_arguments(sub)
    from .bench import report

    sub = command("bench report", report.run, "results of bench --json as Markdown tables")
    report.add_arguments(sub)
    from .bench import scale

    sub = command(
        "bench scale", scale.run, "what to expect of sequences on many ranks: a prediction"
    )
    scale.add_arguments(sub)
    from .bench import tune

    sub = command("tune", tune.run, "try launch parameters of kernels here, and keep the best")
    tune.add_arguments(sub)
    from .bench import page

    sub = command("report", page.run, "results of bench and check as one HTML file")
    page.add_arguments(sub)
    from . import demo

    sub = command(
        "demo",
        demo.run,
        "a pretrained encoder, small language models, generate() and a vision transformer on one "
        "page",
    )
    demo.add_arguments(sub)
    from .evaluation import command as evaluation

    sub = command(
        "evaluate",
        evaluation.run,
        "policies on a language model: loss, needles, tokens per second and bytes read",
    )
    evaluation.add_arguments(sub)
    from .papers import show

    sub = command("papers", show.run, "the papers behind the package, and what computes each")
    show.add_arguments(sub)
    return parser


def run_info(options: argparse.Namespace) -> int:
    build = _info.build_info()
    machine = _info.machine()
    for title, entries in (
        ("build", build),
        ("machine", machine),
        ("backends", _explain.backends()),
        ("environment variables", _info.ENVIRONMENT),
    ):
        print(title)
        for key, value in entries.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            print(f"  {key:<20} {shown or 'none'}")
    return 0


def run_ops(options: argparse.Namespace) -> int:
    backends = "".join(f"{b:<11}" for b in choose.BACKENDS)
    print(f"{'operator':<26}{'family':<10}{backends}DTensors split along")
    for spec in registry.ops().values():
        cells = [_explain.kernels(spec, backend) for backend in choose.BACKENDS]
        columns = "".join(f"{c:<11}" for c in cells)
        print(f"{spec.name:<26}{spec.family:<10}{columns}{spec.splits_along}")
        print(f"  {spec.paper}")
    return 0


def _add_explain_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("op", type=_cli.operator, help="the operator")
    sub.add_argument("--sample", help="which of the operator's sample calls (default: the first)")
    sub.add_argument(
        "--dtype",
        choices=[*DTYPES, "float64"],
        default="float32",
        help="of the tensors (default float32)",
    )
    sub.add_argument("--device", default="cpu", help="of the tensors: cpu (default) or cuda")
    sub.add_argument(
        "--backend",
        choices=choose.ALL_BACKENDS,
        help="backend asked for (default: the first that can)",
    )
    sub.add_argument(
        "--chip", help="which CUDA kernel this chip runs (sm_80, sm_90, 12.0), wherever tensors are"
    )


def run_explain(options: argparse.Namespace) -> int:
    spec = registry.get(options.op)
    samples = {sample.name: sample for sample in spec.samples}
    name = options.sample or next(iter(samples))
    if name not in samples:
        raise _cli.UsageError(f"--sample: must be one of {', '.join(samples)}; got '{name}'")
    device = _device(options.device)
    dtype = DTYPES.get(options.dtype, torch.float64)
    args, kwargs = samples[name].make(dtype, torch.Generator().manual_seed(0))
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    placed: dict[str, Any] = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()
    }
    backend, chip = options.backend, options.chip
    try:
        print(_explain.explain(spec.name, *moved, backend=backend, device=chip, **placed))
    except InputError as error:  # explain returns the errors of calls
        raise _cli.UsageError(f"--chip: {error}") from None
    return 0


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        usable = device.type in ("cpu", "cuda")
        if usable:
            torch.empty(0, device=device)
    except (AssertionError, RuntimeError):  # no such type; no CUDA in this torch; no such GPU
        usable = False
    if not usable:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = "cpu or cuda" if gpus else "cpu: there is no GPU"
        raise _cli.UsageError(f"--device: must be a device of this machine ({there}); got '{name}'")
    return device


if __name__ == "__main__":
    sys.exit(main())
