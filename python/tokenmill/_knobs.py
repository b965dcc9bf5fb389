"""Integer knobs that select kernels and partition their work, and the tuned values of this machine.

A call uses the standard values unless the cache of `python -m tokenmill tune` holds better ones for
the device, this version and the operator. The cache is read once: for the CPU at import, for a GPU
when torch initialises it. A knob of order changes the order of sums, so results differ in their
last bits from the standard value's; other knobs change no bit.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._call import library
from ._info import cpu_model
from ._version import __version__

FORMAT = "tokenmill tune 1"
VARIABLE = "TOKENMILL_TUNE_CACHE"
TABLE = 0  # knob value that defers to the table of its kernel


@dataclass(frozen=True)
class Knob:
    """cases: pattern for titles of the operator's benchmarks that measure the knob. switch: for a
    knob of a kernel for one kind of chip, the knob that switches this kernel on.
    """

    name: str
    op: str
    backend: str  # cpu, cuda or triton
    standard: int
    candidates: tuple[int, ...]
    what: str
    cases: str
    order: bool = False
    switch: str = ""

    @property
    def valid(self) -> frozenset[int]:
        return frozenset((self.standard, *self.candidates))


SHARES = (1, 2, 4, 8, 16)
ATTENTION_CASES = r"(sigmoid causal|softmax dense) S=2048 D=64, (float32|bfloat16), forward$"
PLAIN = r"(sigmoid|softmax) \w+"  # other kinds and windows of attention use the table
SPARSE_CASES = r"S=8192 D=64 blocks 64x(64|16) 20 %, \w+, forward$"


def _triton(op: str, width: int, cases: str, tiles: bool) -> Iterator[Knob]:
    """Knobs of the forward tiles of a Triton kernel for 16-bit heads of up to `width` elements.
    Warps and tiles determine the order of sums.
    """
    for name, candidates, what, order in (
        ("stages", (1, 2, 3, 4), "loads of tiles that are under way together", False),
        ("warps", (2, 4, 8), "warps of a program", True),
        ("block_m", (16, 32, 64, 128), "queries of a tile", True),
        ("block_n", (16, 32, 64, 128), "keys of a tile", True),
    ):
        if tiles or not name.startswith("block"):
            full = f"{op}.triton{width}.{name}"
            yield Knob(full, op, "triton", TABLE, candidates, what, cases, order)


def _of_chips() -> Iterator[Knob]:
    """Knobs of kernels for one kind of chip (docs/hopper.md), which others ignore."""
    dense = r"^(sigmoid \w+ S=2048 D=(64|128)|softmax causal S=\d+ D=128), bfloat16, forward"
    listed = r"^S=8192 D=64 blocks 64x64 \d+ %, bfloat16, forward"
    for name, cases in (
        ("attention.sm90", dense),
        ("attention.sm90_backward", dense),
        ("attention_decode.sm90", r"pages of 64, bfloat16, forward"),
        ("block_sparse_attention.sm90", listed),
        ("block_sparse_attention.sm90_backward", listed),
        ("linear_attention.sm90", r"S=8192 D=128, bfloat16, forward"),
    ):
        part = "backward" if name.endswith("backward") else "forward"
        yield Knob(
            name, name.split(".")[0], "cuda", 1, (0, 1),
            f"{part}: the sm_90a kernel where it takes a call (1), or the sm_80 kernel (0)",
            cases + (r"\+backward$" if part == "backward" else "$"),
            order=True, switch=name,
        )  # fmt: skip
    yield Knob(
        "attention.sm90_section", "attention", "cuda", 32, (0, 16, 24, 32, 48),
        "MB of the L2 cache for keys and values of the heads that are in use at once (0: one "
        "head); attention_decode too",
        r"^softmax causal S=\d+ D=128, \w+, forward$",
        switch="attention.sm90",
    )  # fmt: skip
    yield Knob(
        "attention.sm90_grid", "attention", "cuda", 0, (0, 1, 2),
        "blocks: one for each multiprocessor (0), as few as need no more rounds (1), or one for "
        "each tile of queries (2); attention_decode too",
        dense + "$",
        switch="attention.sm90",
    )  # fmt: skip
    yield Knob(
        "attention_decode.sm90_tiles", "attention_decode", "cuda", 256, (64, 128, 256, 512),
        "tiles of 64 queries from which on causal calls take the kernel for 9.0, which does not "
        "divide the keys of a request",
        r"S=8192 (128|256|512) tokens, bfloat16, forward$",
        order=True, switch="attention_decode.sm90",
    )  # fmt: skip


KNOBS = {
    knob.name: knob
    for knob in (
        Knob(
            "attention.shares", "attention", "cpu", 4, SHARES,
            "items of work for each thread; each packs the keys of its head again",
            ATTENTION_CASES,
        ),
        Knob(
            "block_sparse_attention.shares", "block_sparse_attention", "cpu", 4, SHARES,
            "the same; bilevel_routing_attention takes it too",
            SPARSE_CASES,
        ),
        Knob(
            "indexer_topk_select.rows", "indexer_topk_select", "cpu", 1024, (256, 512, 1024, 2048),
            "rows of queries and heads that stay in a cache while keys stream past",
            r"256 queries of 16384, \w+, forward$",
        ),
        Knob(
            "best_match.words", "best_match", "cpu", 65536, (16384, 32768, 65536, 131072, 262144),
            "words of rows that stay in the second-level cache",
            r"^8 x 4096 tokens, C=(64|320), (float32|bfloat16), forward$",
        ),
        Knob(
            "cluster_tokens.floats", "cluster_tokens", "cpu", 65536,
            (16384, 32768, 65536, 131072, 262144),
            "the same, in floats; reconstruct_tokens takes it too",
            r"C=(192|384), \w+, forward$",
        ),
        Knob(
            "attention_decode.range", "attention_decode", "cpu", 256, (64, 128, 256, 512, 1024),
            "steps of 32 keys in an automatic range of a head; sparse_decode_attention too",
            r"D=128 S=(8192|65536), \w+, forward$",
            order=True,
        ),
        Knob(
            "best_match.fill", "best_match", "cuda", 2, (1, 2, 4, 8),
            "blocks for each multiprocessor from which on tiles have twice the rows",
            r"^(64 x 197|8 x 577|8 x 4096) tokens, C=64, \w+, forward$",
        ),
        Knob(
            "hip_block_select.fill", "hip_block_select", "cuda", 1, (0, 1, 2, 4),
            "blocks for each multiprocessor up to which a block has many warps",
            r"lists, \w+, forward$",
        ),
        *_triton(
            "attention", 64, rf"{PLAIN} S=2048 D=64, (bfloat16|float16), forward$", tiles=True
        ),
        *_triton("attention", 128, rf"{PLAIN} S=2048 D=128, bfloat16, forward$", tiles=True),
        *_triton("linear_attention", 64, r"S=8192 D=64, (bfloat16|float16), forward$", tiles=False),
        *_triton("block_sparse_attention", 64, r"64x(64|16) 20 %, bfloat16, forward$", tiles=False),
        *_of_chips(),
    )
}  # fmt: skip
triton_values = {k.name: k.standard for k in KNOBS.values() if k.backend == "triton"}


def value(name: str) -> int:
    if name in triton_values:
        return triton_values[name]
    return int(library.native.knob(name))


def put(name: str, number: int) -> None:
    """Sets a knob for later calls, including those on the PTX machine once it is loaded."""
    if name in triton_values:
        triton_values[name] = number
        return
    library.native.knob(name, number)
    if emulated := library.loaded_emulated():
        emulated.knob(name, number)


def _copy_to(emulated: Any) -> None:
    """Copies the current values to the emulated library, a namespace that is being filled."""
    for name in KNOBS:
        if name not in triton_values:
            emulated.knob(name, value(name))


if library.emulated_namespace is not None:
    library.emulated_namespace.finishers.append(_copy_to)


def refusals(switch: str) -> list[str]:
    """The broken rule if a knob switches its kernel off; empty otherwise, and without a knob."""
    return [f"{switch}: must be 1; got 0"] if switch and not value(switch) else []


def shown(name: str) -> str:
    number, standard = value(name), KNOBS[name].standard
    if number == standard:
        return f"{number} (standard)"
    return f"{number} (tuned; standard {standard})"


@contextlib.contextmanager
def override(**values: int) -> Iterator[None]:
    """Sets values temporarily; a dot in a name is written as two underscores."""
    named = {name.replace("__", "."): number for name, number in values.items()}
    before = {name: value(name) for name in named}
    try:
        for name, number in named.items():
            put(name, number)
        yield
    finally:
        for name, number in before.items():
            put(name, number)


def path() -> Path:
    """Path of the cache."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "tokenmill" / "tune.json"


def device_name(device: str) -> str:
    """The cache's name for a device. Mixed kinds of GPUs have no name, and so no tuned values."""
    if device == "cpu":
        return f"{cpu_model()} ({library.native.cpu_isa()})"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return names.pop() if len(names) == 1 else ""


class Damaged(Exception):
    """The contents of the cache are not valid."""


def read(file: Path) -> dict[str, Any]:
    """{device: {version: {op: entry}}}; empty for a file that is missing or empty, and for anything
    but a regular file (reading a pipe would never end).
    """
    try:
        text = file.read_text() if file.is_file() else ""
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(str(error)) from None
    if not text.strip():
        return {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Damaged(f"its format is not '{FORMAT}'")
    devices = document.get("devices")
    if not isinstance(devices, dict) or not _nested(devices, 3):
        raise Damaged("devices, versions and operators are not where they belong")
    return devices


def _nested(value: Any, levels: int) -> bool:
    """Whether value is nested objects, with the given number of levels below it."""
    if not isinstance(value, dict):
        return False
    return levels == 0 or all(_nested(v, levels - 1) for v in value.values())


def numbers(entries: dict[str, Any]) -> dict[str, int]:
    """The knob values in {op: entry}."""
    found: dict[str, int] = {}
    for op, entry in entries.items():
        knobs = entry.get("knobs")
        if not isinstance(knobs, dict):
            raise Damaged(f"the entry of {op} has no knobs")
        for name, number in knobs.items():
            knob = KNOBS.get(name)
            if knob is None or knob.op != op:
                raise Damaged(f"{op} has no knob '{name}'")
            if type(number) is not int or number not in knob.valid:
                allowed = ", ".join(map(str, sorted(knob.valid)))
                raise Damaged(f"{name} must be one of {allowed}; got {number!r}")
            found[name] = number
    return found


def _sound(op: str, entry: dict[str, Any]) -> bool:
    try:
        numbers({op: entry})
    except Damaged:
        return False
    return True


def load() -> None:
    """Loads the tuned values of this machine from the cache. A damaged cache is one warning, and
    all values are the standard ones.
    """
    file = path()
    try:
        devices = read(file)
        tuned = {
            device: numbers(versions[__version__])
            for device, versions in devices.items()
            if __version__ in versions
        }
    except Damaged as why:
        warnings.warn(
            f"tokenmill: the tuning cache {file} is ignored: {why} "
            "(python -m tokenmill tune writes a new one)",
            stacklevel=2,
        )
        return
    if not tuned:
        return
    _take(tuned.get(device_name("cpu"), {}), ("cpu",))
    # Runs when torch initialises CUDA, or now if it already has.
    later = getattr(torch.cuda, "_lazy_call", None)
    if later and any(KNOBS[n].backend != "cpu" for values in tuned.values() for n in values):
        later(functools.partial(_take_of_gpu, tuned))


def _take_of_gpu(tuned: dict[str, dict[str, int]]) -> None:
    _take(tuned.get(device_name("cuda"), {}), ("cuda", "triton"))


def _take(values: dict[str, int], backends: tuple[str, ...]) -> None:
    for name, number in values.items():
        if KNOBS[name].backend in backends:
            put(name, number)


def entry_of(file: Path, device: str, op: str) -> dict[str, Any]:
    """The cache entry of an operator on a device for this version; none if damaged."""
    try:
        entry = read(file).get(device, {}).get(__version__, {}).get(op, {})
    except Damaged:
        return {}
    return entry if _sound(op, entry) else {}


def prepare(file: Path) -> Path:
    """The regular file of the cache, existing or to be created, with links resolved, in a writable
    folder. OSError if there is none.
    """
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent):
        return file


def write(file: Path, device: str, op: str, entry: dict[str, Any]) -> None:
    """Adds the entry of an operator on a device to the cache, atomically: a reader sees the file
    before or after. Entries of other versions and devices are kept; damaged contents are dropped. A
    new file is world-readable; an existing file keeps its mode.
    """
    file = prepare(file)
    mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o644
    try:
        devices = read(file)
    except Damaged:
        devices = {}
    for versions in devices.values():
        entries = versions.get(__version__, {})
        for name in [name for name, old in entries.items() if not _sound(name, old)]:
            del entries[name]
    devices.setdefault(device, {}).setdefault(__version__, {})[op] = entry
    text = json.dumps({"format": FORMAT, "devices": devices}, indent=1) + "\n"
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(descriptor, "w") as to:
            to.write(text)
            os.fchmod(descriptor, mode)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
