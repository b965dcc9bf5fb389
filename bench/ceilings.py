"""Peak rates of a machine, in operations and bytes per second, that rows are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .gpu import CudaDevice, event_seconds
from .timing import Run, interleave

TRAFFIC = ("read", "copy")
RATES = ("fma", "matmul")  # primitives whose maximum is the ceiling of a dtype


@dataclass(frozen=True)
class Ceilings:
    flops: dict[str, float]  # per second, by dtype
    bandwidth: tuple[tuple[float, float], ...]  # (working set bytes, rate), ascending
    source: str

    def bytes_per_second(self, working_set: float) -> float:
        """Bandwidth, interpolated log-log between two measured sizes."""
        below, rate_below = self.bandwidth[0]
        for size, rate in self.bandwidth:
            if working_set <= size:
                if below == size:
                    return rate
                part = math.log(working_set / below) / math.log(size / below)
                return rate_below + part * (rate - rate_below)
            below, rate_below = size, rate
        return rate_below

    @property
    def memory(self) -> float:
        """Bandwidth of working sets that exceed all caches."""
        return self.bandwidth[-1][1]


@dataclass(frozen=True)
class Bound:
    """The binding ceiling of a call, and the share of it that the call reaches."""

    of: str  # "compute" or "memory"
    share: float


def bound(row: dict[str, Any], flops: float, bandwidth: float) -> Bound:
    """Roofline bound of a row with flops and bytes_per_second, at its operations per byte."""
    compute, memory = row["flops"] / flops, row["bytes_per_second"] / bandwidth
    return Bound("compute", compute) if compute >= memory else Bound("memory", memory)


def row_bound(row: dict[str, Any], results: dict[str, Any]) -> Bound:
    """Bound recorded in a result row, or computed from it before schema 2. A row without operations
    has a peak share of 0."""
    if "bound" in row:
        return Bound(row["bound"], row["bound_share"])
    if not row["peak_share"]:
        return Bound("memory", row["bytes_per_second"] / results["copy_bandwidth"])
    return bound(row, row["flops"] / row["peak_share"], results["copy_bandwidth"])


def from_primitives(rows: Iterable[dict[str, Any]], device: str, threads: int) -> Ceilings:
    """Ceilings from primitives; ValueError if they lack a value that rows of this device and number
    of threads need. The bandwidth of a size is the maximum of read and copy; a GPU, measured with a
    cold L2 cache, has one bandwidth."""
    units = 1 if device == "cuda" else threads
    rows = [row for row in rows if "value" in row and row.get("threads", 1) == units]
    flops: dict[str, float] = {}
    for row in rows:
        if row["primitive"] in RATES:
            flops[row["dtype"]] = max(row["value"], flops.get(row["dtype"], 0.0))
    for narrow in {"float16", "bfloat16"} & {*flops}:  # 16-bit dtypes may be computed as float32
        flops[narrow] = max(flops[narrow], flops.get("float32", 0.0))
    sizes: dict[float, float] = {}
    for row in rows:
        if row["primitive"] in TRAFFIC:
            size = math.inf if device == "cuda" else row["bytes"]
            sizes[size] = max(row["value"], sizes.get(size, 0.0))
    if not flops or not sizes:
        raise ValueError(f"no rates and copies of {units} thread(s)")
    return Ceilings(flops, tuple(sorted(sizes.items())), "primitives")


def measured(dtypes: Iterable[torch.dtype], gpu: bool, threads: int) -> Ceilings:
    """Measures ceilings in two seconds: one product or loop per dtype, one copy."""
    units = 1 if gpu else threads
    flops = {str(dtype)[6:]: peak_flops(dtype, gpu) * units for dtype in dtypes}
    rate = copy_bandwidth(gpu, threads)
    return Ceilings(flops, ((math.inf, rate),), "quick")


def with_dtypes(
    ceilings: Ceilings, dtypes: Sequence[torch.dtype], gpu: bool, threads: int
) -> Ceilings:
    """The ceilings, with a quick measurement of each missing dtype."""
    names = {str(dtype)[6:]: dtype for dtype in dtypes}
    lacking = [dtype for name, dtype in names.items() if name not in ceilings.flops]
    more = {str(d)[6:]: peak_flops(d, gpu) * (1 if gpu else threads) for d in lacking}
    return Ceilings(ceilings.flops | more, ceilings.bandwidth, ceilings.source)


def peak_flops(dtype: torch.dtype, gpu: bool = False) -> float:
    """Measured multiply-add peak for the arithmetic that serves a dtype: of one thread, or a GPU's
    rate in a large matrix product (float32 in TF32, as our kernels compute it)."""
    if gpu:
        # CUDA has no integer matrix product; float32 stands in for it.
        return _gpu_product_rate(dtype if dtype.is_floating_point else torch.float32)
    wide = dtype == torch.bfloat16 and multiplies_bfloat16()
    return torch.ops.tokenmill.cpu_peak_flops("bfloat16" if wide else "float32")


def multiplies_bfloat16() -> bool:
    """True if the CPU kernels in use have products of bfloat16."""
    return torch.ops.tokenmill.cpu_isa() in ("avx512_bf16", "avx512_amx")


def _gpu_product_rate(dtype: torch.dtype) -> float:
    n = 8192
    x = torch.randn(n, n, device="cuda").to(dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        runs: dict[str, Run] = {"product": lambda: x @ x}
        timing = interleave(runs, seconds=0.5, measure=event_seconds(CudaDevice()))["product"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2.0 * n**3 / timing.median


def copy_bandwidth(gpu: bool = False, threads: int = 1) -> float:
    """Bytes per second of a large copy, reads plus writes."""
    source = torch.zeros(1 << (28 if gpu else 24), device="cuda" if gpu else "cpu")
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source)}
    measure = event_seconds(CudaDevice()) if gpu else None
    timing = interleave(runs, threads=threads, seconds=0.3, measure=measure)["copy"]
    return 2 * source.numel() * 4 / timing.best
