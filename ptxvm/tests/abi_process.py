"""Runs the libraries of test_abi.py in a process without torch: with CUDA, torch loads a runtime of
the name that they ask for, and the loader resolves a name to the first library that has it."""

from __future__ import annotations

import contextlib
import ctypes
import functools

import numpy as np
from machine import machine

_arrays: dict[int, np.ndarray] = {}
_options = contextlib.ExitStack()


@functools.cache
def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.text_of.restype = ctypes.c_char_p
    return library


def call(
    path: str, function: str, arguments: list[int | tuple[int, np.ndarray]]
) -> tuple[int, list[np.ndarray]]:
    """Return value of the function, and its arrays afterwards. Each array comes with a key, under
    which it is global memory at one address until it is released."""
    values: list[ctypes.c_void_p | int] = []
    arrays = []
    for argument in arguments:
        if isinstance(argument, int):
            values.append(argument)
            continue
        key, contents = argument
        array = _arrays.setdefault(key, contents)
        address = ctypes.c_void_p(array.ctypes.data)
        if array is contents:
            machine.library.ptxvm_register(address, ctypes.c_size_t(array.nbytes), 1)
        array[:] = contents
        values.append(address)
        arrays.append(array)
    return int(getattr(_library(path), function)(*values)), arrays


def release() -> None:
    for array in _arrays.values():
        machine.library.ptxvm_unregister(ctypes.c_void_p(array.ctypes.data))
    _arrays.clear()


def text(path: str, error: int) -> str:
    return str(_library(path).text_of(error).decode())


def recover() -> None:
    machine.library.ptxvm_recover()


def set_options(options: dict[str, int | str]) -> None:
    """Sets options of the machine; options set before return to their defaults."""
    _options.close()
    _options.enter_context(machine.options(**options))
