"""The PTX machine inside the emulated library of a development build: its options, checks and
counters. `tokenmill.ptx` is the machine for other kernels; options of the two are apart."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import _library

if TYPE_CHECKING:
    from .ptx.vm import Machine, Report


@functools.cache
def machine() -> Machine:
    """The machine inside the emulated library."""
    if not _library.emulated_built():
        raise RuntimeError("tokenmill.emulator: not in this build (TOKENMILL_PTXVM=1)")
    from .ptx.vm import Machine  # not a name of tokenmill before it is asked for

    return Machine(_library.EMULATED_PATH)


def configure(settings: str) -> None:
    """Sets options of the machine: "check=1,order=reverse,seed=7" (docs/ptxvm.md lists them)."""
    try:
        machine().configure(**_options(settings))
    except RuntimeError as error:
        raise ValueError(f"tokenmill.emulator: {error}") from None


def device() -> str:
    """The device whose limits apply: "sm_80"."""
    return machine().settings["device"]


@contextlib.contextmanager
def configured(settings: str) -> Iterator[None]:
    """Sets options for a while; afterwards those named are what they were."""
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
    """Counts what the kernels inside do. The list is filled at the end, one entry per launch.

    Example:
        >>> import torch, tokenmill as tm
        >>> from tokenmill import _emulator, _library
        >>> x = torch.randn(2, 1, 16, 2, 64)
        >>> if _library.emulated_built():
        ...     with _emulator.counting() as launches:
        ...         out = tm.merge_attention_states(x, None, backend="emulated")
        ...     assert launches[0]["instructions"] > 0
    """
    return machine().counting()


def reporting() -> contextlib.AbstractContextManager[list[Report]]:
    """Lets kernels inside go on after they break a rule of check mode or leave their memory
    (docs/ptxvm.md). The list is filled at the end, an entry for each rule at each line.

    Example:
        >>> import torch, tokenmill as tm
        >>> from tokenmill import _emulator, _library
        >>> x = torch.randn(2, 1, 16, 2, 64)
        >>> if _library.emulated_built():
        ...     with _emulator.configured("check=1"), _emulator.reporting() as reports:
        ...         out = tm.merge_attention_states(x, None, backend="emulated")
        ...     assert not reports
    """
    return machine().reporting()
