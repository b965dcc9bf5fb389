"""python -m tokenmill info | ops | explain | check | bench | demo"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from . import dispatch, info, registry, testing

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tokenmill", description="Look at, check and measure this build."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        return sub

    command("info", run_info, "versions, compilers, instruction sets, GPUs, environment variables")
    command("ops", run_ops, "every operator and the backends that it has in this build")
    sub = command("explain", run_explain, "which kernel runs a call, and why the others do not")
    sub.add_argument("op", choices=list(registry.ops()))
    sub.add_argument("--sample", help="which of the operator's sample calls (default: the first)")
    sub.add_argument("--dtype", choices=[*DTYPES, "float64"], default="float32")
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--backend", choices=dispatch.ALL_BACKENDS)
    sub = command("check", run_check, "every operator on this machine against the float64 oracle")
    sub.add_argument("ops", nargs="*", help="operators to check (default: all)")
    sub.add_argument("--backend", action="append", choices=dispatch.BACKENDS)
    sub.add_argument("--all-isas", action="store_true", help="every instruction set, not the best")
    sub.add_argument("--verbose", action="store_true", help="a line for every tensor")
    from .bench import run as bench

    sub = command("bench", bench.run, "named cases against named peers, in one process")
    bench.add_arguments(sub)
    from . import demo

    sub = command(
        "demo", demo.run, "a pretrained encoder and a small language model on our kernels"
    )
    demo.add_arguments(sub)
    options = parser.parse_args(argv)
    return options.run(options)


def run_info(options: argparse.Namespace) -> int:
    build = info.build_info()
    machine = info.machine()
    for title, entries in (
        ("build", build),
        ("machine", machine),
        ("backends", dispatch.backends()),
        ("environment variables", info.ENVIRONMENT),
    ):
        print(title)
        for key, value in entries.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            print(f"  {key:<20} {shown or 'none'}")
    return 0


def run_ops(options: argparse.Namespace) -> int:
    print(f"{'operator':<26}{'family':<10}" + "".join(f"{b:<11}" for b in dispatch.BACKENDS))
    for spec in registry.ops().values():
        cells = []
        for backend in dispatch.BACKENDS:
            ops = list(spec.torch_ops)
            if backend == "reference":
                have = [True]
            elif backend == "triton":
                have = [op.triton is not None for op in ops]
            elif backend == "emulated":
                have = [op.has_emulated() for op in ops]
            else:
                have = [op.has_native(backend.upper()) for op in ops]
            cells.append("yes" if all(have) else "forward" if have[0] else "-")
        print(f"{spec.name:<26}{spec.family:<10}" + "".join(f"{c:<11}" for c in cells))
        print(f"  {spec.paper}")
    return 0


def run_explain(options: argparse.Namespace) -> int:
    spec = registry.get(options.op)
    samples = {sample.name: sample for sample in spec.samples}
    name = options.sample or next(iter(samples))
    if name not in samples:
        print(f"no sample {name!r}; there are: {', '.join(samples)}", file=sys.stderr)
        return 2
    dtype = DTYPES.get(options.dtype, torch.float64)
    args, kwargs = samples[name].make(dtype, torch.Generator().manual_seed(0))
    moved = [a.to(options.device) if isinstance(a, torch.Tensor) else a for a in args]
    placed = {
        k: v.to(options.device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()
    }
    print(dispatch.explain(spec.name, *moved, backend=options.backend, **placed))
    return 0


def run_check(options: argparse.Namespace) -> int:
    backends = options.backend or [b for b in _here() if b != "reference"]
    specs = [registry.get(name) for name in options.ops] or list(registry.ops().values())
    failed = total = 0
    for backend in backends:
        device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
        isas = testing.cpu_isas() if backend == "cpu" and options.all_isas else [None]
        for isa in isas:
            label = f"{backend} {isa}" if isa else backend
            for spec in specs:
                worst, wrong = 0.0, []
                for dtype in DTYPES.values():
                    for sample in spec.samples:
                        found = _compare(spec, sample, backend, dtype, device, isa)
                        total += len(found)
                        worst = max([worst, *(c.error / c.allowed for c in found)])
                        named = f"{sample.name}, {str(dtype)[6:]}"
                        wrong += [(named, c) for c in found if not c.ok]
                        for c in found if options.verbose else []:
                            print(f"    {named}: {c.name} {c.error:.2e} of {c.allowed:.2e}")
                print(
                    f"{label:<18}{spec.name:<26}"
                    f"{'ok' if not wrong else 'WRONG':<7}largest share of the budget {worst:.0%}",
                    flush=True,
                )
                for named, c in wrong:
                    print(f"    {named}: {c.name} error {c.error:.3g}, allowed {c.allowed:.3g}")
                failed += len(wrong)
    print(f"{total - failed} of {total} tensors within their error budget")
    return 1 if failed else 0


def _compare(
    spec: registry.OpSpec,
    sample: registry.Sample,
    backend: str,
    dtype: torch.dtype,
    device: str,
    isa: str | None,
) -> list[testing.Comparison]:
    if isa is None:
        return testing.compare(spec, sample, backend, dtype, device=device)
    with testing.cpu_isa(isa):
        return testing.compare(spec, sample, backend, dtype, device=device)


def _here() -> list[str]:
    """Backends that this machine can run."""
    state = dispatch.backends()
    ready = ("available", "interpreter")
    return [name for name in dispatch.BACKENDS if state[name].startswith(ready)]


if __name__ == "__main__":
    sys.exit(main())
