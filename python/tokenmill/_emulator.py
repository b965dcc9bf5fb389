"""The PTX machine inside the emulated library of a development build: its options, checks and
counters. Package `ptxvm` has another machine, for other kernels, with options of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._call import library

if TYPE_CHECKING:
    from ptxvm import Machine, Report


@functools.cache
def machine() -> Machine:
    """The machine inside the emulated library."""
    if not library.emulated_built():
        raise RuntimeError("tokenmill.emulator: not in this build (TOKENMILL_PTXVM=1)")
    try:
        from ptxvm import Machine
    except ImportError as error:
        rule = "needs the package ptxvm (pip install ./ptxvm)"
        raise RuntimeError(f"tokenmill.emulator: {rule}") from error

    return Machine(library.EMULATED_PATH)


def configure(settings: str) -> None:
    """Sets options of the machine: "check=1,order=reverse,seed=7" (ptxvm/docs/guide.md)."""
    try:
        machine().configure(**_options(settings))
    except RuntimeError as error:
        raise ValueError(f"tokenmill.emulator: {error}") from None


def device() -> str:
    """The device whose limits apply, e.g. "sm_80"."""
    return machine().settings["device"]


@contextlib.contextmanager
def configured(settings: str) -> Iterator[None]:
    """Sets options temporarily, and restores their previous values afterwards."""
    before = machine().settings
    configure(settings)
    try:
        yield
    finally:
        machine().configure(**{name: before[name] for name in _options(settings)})


def _options(settings: str) -> dict[str, int | str]:
    options: dict[str, int | str] = {}
    for setting in settings.split(","):
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"tokenmill.emulator: settings: must be NAME=VALUE; got '{setting}'")
        options[name.strip()] = value.strip()
    return options


def counting() -> contextlib.AbstractContextManager[list[dict[str, Any]]]:
    """Counts the work of kernels in the context. The list is filled at the end, one entry per
    launch.

    Example:
        >>> import torch, tokenmill as tm
        >>> from tokenmill import _emulator
        >>> from tokenmill._call import library
        >>> x = torch.randn(2, 1, 16, 2, 64)
        >>> if library.emulated_built():
        ...     with _emulator.counting() as launches:
        ...         out = tm.merge_attention_states(x, None, backend="emulated")
        ...     assert launches[0]["instructions"] > 0
    """
    return machine().counting()


def reporting() -> contextlib.AbstractContextManager[list[Report]]:
    """Lets kernels in the context continue after breaking a rule of check mode or accessing memory
    out of bounds (ptxvm/docs/guide.md). The list is filled at the end, one entry per rule and line.

    Example:
        >>> import torch, tokenmill as tm
        >>> from tokenmill import _emulator
        >>> from tokenmill._call import library
        >>> x = torch.randn(2, 1, 16, 2, 64)
        >>> if library.emulated_built():
        ...     with _emulator.configured("check=1"), _emulator.reporting() as reports:
        ...         out = tm.merge_attention_states(x, None, backend="emulated")
        ...     assert not reports
    """
    return machine().reporting()
