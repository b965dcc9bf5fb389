"""Tensors between inaccessible pages: an access out of bounds kills the process."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from tokenmill.testing import map_tensors

End = Literal["front", "back"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NOTHING, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Guard:
    """Places copies of tensors flush against an inaccessible page.

    Closing the guard frees the memory: nothing that refers to a copy may be used afterwards.
    """

    def __init__(self, end: End):
        self.end = end
        self._areas: list[tuple[int, int]] = []
        # also holds the original, so that its id stays valid
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        """Replaces tensors, also inside tuples, lists and dicts, by their copies."""
        return map_tensors(value, self._copy)

    def _copy(self, t: Tensor) -> Tensor:
        if id(t) not in self._copies:
            self._copies[id(t)] = (t, self._place(t))
        return self._copies[id(t)][1]

    def _place(self, t: Tensor) -> Tensor:
        """Copies only plain tensors that own all their memory; others are unchanged."""
        if not t.is_contiguous() or t.is_neg() or t.is_conj() or t.device.type != "cpu":
            return t
        if t.is_inference() or t.numel() > 2**22:
            return t
        page, size = mmap.PAGESIZE, t.numel() * t.element_size()
        inside = max(-(-size // page), 1) * page
        base = _libc.mmap(None, inside + 2 * page, _READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
        if base is None or base == ctypes.c_void_p(-1).value:
            raise MemoryError(f"mmap of {inside + 2 * page} bytes failed")
        self._areas.append((base, inside + 2 * page))
        for guarded in (base, base + page + inside):
            _libc.mprotect(guarded, page, _NOTHING)
        # An empty tensor begins where one of its elements would end, or begin.
        seen = max(size, t.element_size())
        at = base + page + (inside - seen if self.end == "back" else 0)
        memory = (ctypes.c_char * seen).from_address(at)
        flat = torch.frombuffer(memory, dtype=t.dtype)
        if size == 0:
            flat = flat[1:] if self.end == "back" else flat[:0]
        copy = flat.view(t.shape)
        if size:
            copy.copy_(t.detach())
        return copy.requires_grad_(t.requires_grad)

    def close(self) -> None:
        self._copies.clear()
        for base, size in self._areas:
            _libc.munmap(base, size)
        self._areas.clear()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def tensors(value: Any, *, records: bool = False) -> Iterator[Tensor]:
    """All tensors inside tuples, lists, dicts and dataclass fields."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item, records=records)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()), records=records)
    elif records and dataclasses.is_dataclass(value):
        yield from tensors([getattr(value, f.name) for f in dataclasses.fields(value)])
