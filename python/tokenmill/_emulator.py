"""The PTX machine of a development build seen from Python: its options, checks and counters."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
from collections.abc import Iterator
from typing import Any

from . import _library


@functools.cache
def machine() -> ctypes.CDLL:
    """The machine inside the emulated library, through the functions of csrc/ptxvm/host_api.h."""
    if not _library.emulated_built():
        raise RuntimeError("tokenmill.emulator: not in this build (TOKENMILL_PTXVM=1)")
    found = ctypes.CDLL(str(_library.EMULATED_PATH))
    found.ptxvm_configure.argtypes = [ctypes.c_char_p]
    found.ptxvm_last_report.restype = ctypes.c_char_p
    found.ptxvm_counters.restype = ctypes.c_char_p
    found.ptxvm_reports.restype = ctypes.c_char_p
    return found


_chosen: dict[str, str] = {}  # by configure


def configure(settings: str) -> None:
    """Sets options of the machine: "check=1,order=reverse,seed=7" (docs/ptxvm.md lists them)."""
    if machine().ptxvm_configure(settings.encode()):
        raise ValueError(f"tokenmill.emulator: {machine().ptxvm_last_report().decode()}")
    _chosen.update(
        (n.strip(), v.strip()) for n, _, v in (s.partition("=") for s in settings.split(","))
    )


def device() -> str:
    """The device whose limits apply: "sm_80"."""
    return _chosen.get("device", _initial("device"))


@contextlib.contextmanager
def counting() -> Iterator[list[dict[str, Any]]]:
    """Counts what the kernels inside do. The list is filled at the end, one entry per launch.

    Example:
        >>> import torch, tokenmill as tm
        >>> from tokenmill import emulator, library
        >>> x = torch.randn(2, 1, 16, 2, 64)
        >>> if library.emulated_built():
        ...     with emulator.counting() as launches:
        ...         out = tm.merge_attention_states(x, None, backend="emulated")
        ...     assert launches[0]["instructions"] > 0
    """
    launches: list[dict[str, Any]] = []
    machine().ptxvm_reset_counters()
    try:
        with configured("count=1"):
            yield launches
        launches += json.loads(machine().ptxvm_counters())["launches"]
    finally:
        machine().ptxvm_reset_counters()


@contextlib.contextmanager
def reporting() -> Iterator[dict[str, int]]:
    """Lets kernels inside go on after they break a rule of check mode or leave their memory
    (docs/ptxvm.md). The dict is filled at the end: the first report of each rule at each line, and
    how often it was broken.

    Example:
        >>> import torch, tokenmill as tm
        >>> from tokenmill import emulator, library
        >>> x = torch.randn(2, 1, 16, 2, 64)
        >>> if library.emulated_built():
        ...     with emulator.configured("check=1"), emulator.reporting() as reports:
        ...         out = tm.merge_attention_states(x, None, backend="emulated")
        ...     assert not reports
    """
    reports: dict[str, int] = {}
    machine().ptxvm_reports()
    with configured("on_fault=report"):
        yield reports
    for line in machine().ptxvm_reports().decode().splitlines():
        count, report = line.split("\t", 1)
        reports[report] = int(count)


_DEFAULTS = {  # of csrc/ptxvm/machine.h
    "check": "0",
    "count": "0",
    "approximate": "0",
    "mma": "exact",
    "order": "forward",
    "seed": "0",
    "resident_blocks": "8",
    "fuel": "20000",
    "watchdog": "4000",
    "device": "sm_80",
    "async": "latest",
    "on_fault": "stop",
}


def _initial(option: str) -> str:
    return os.environ.get(f"PTXVM_{option.upper()}", _DEFAULTS[option])


@contextlib.contextmanager
def configured(settings: str) -> Iterator[None]:
    """Sets options for a while; afterwards those named are as the environment set them."""
    names = [setting.split("=")[0].strip() for setting in settings.split(",")]
    before = {n: _initial(n) for n in names}
    configure(settings)
    try:
        yield
    finally:
        configure(",".join(f"{name}={value}" for name, value in before.items()))
