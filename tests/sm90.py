"""The PTX machine as device sm_90a, with its checks, in several orders of warps and of asynchronous
operations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import tokenmill as tm
from tokenmill import _emulator

MODES = (
    "async=latest",
    "async=earliest,order=reverse",
    "async=seed:1,order=seeded,fuel=300",
)


@contextlib.contextmanager
def hopper(mode: str = MODES[0]) -> Iterator[None]:
    with _emulator.configured(f"device=sm_90a,check=1,{mode}"):
        yield


def check_every_order(call: Callable[[], Sequence[Tensor]]) -> None:
    """Asserts that the results have the same bits in all modes."""
    with hopper():
        first = call()
    for mode in MODES[1:]:
        with hopper(mode):
            again = call()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def check_explained(op: str, why: str, *args: Any, **kwargs: Any) -> Any:
    """Asserts that the kernel that runs is the one that explain names: the sm_90a kernel if `why`
    is empty, else another kernel, because of a broken rule that begins with `why`. Returns the
    results."""
    with _emulator.configured("device=sm_90a"), _emulator.counting() as launches:
        kernel = tm.explain(op, *args, backend="emulated", **kwargs).kernel
        found = getattr(tm, op)(*args, backend="emulated", **kwargs)
    # Without keys nothing is launched.
    takes = any("sm90" in launch["kernel"] for launch in launches)
    assert takes == (f"{op}/kernel_sm90 in" in kernel) == (why == "")
    assert f"(not kernel_sm90: {why}" in kernel or takes
    return found
