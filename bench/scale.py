"""Predicted scaling of sharded sequences: `python -m tokenmill bench scale`, from the rate of a
kernel, the bytes of :func:`tokenmill.distributed.plan` and the figures of a link."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tokenmill import _cli
from tokenmill.dense.attention import attention

from .timing import interleave

# tokenmill.distributed imports torch.distributed, half a second: the functions below import it
# lazily, so that other commands do not wait.


class Link(NamedTuple):
    """Link of one rank to the others."""

    latency: float  # seconds per collective, or per round of log2(P) rounds
    bandwidth: float  # bytes per second, one way


# Nominal figures: NVLink 4 of one H100, InfiniBand NDR and 100 Gbit/s Ethernet of one GPU.
LINKS = {
    "nvlink": Link(3e-6, 450e9),
    "infiniband": Link(5e-6, 50e9),
    "ethernet": Link(30e-6, 12.5e9),
}
RANKS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
LENGTHS = (2**13, 2**16, 2**20, 10_000_000)


class Model(NamedTuple):
    """Model layer, with a batch of one."""

    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int


class Machine(NamedTuple):
    flops: float  # per second, for a kernel on one rank
    memory: float  # bytes per second
    link: Link


def attention_seconds(
    model: Model, machine: Machine, length: int, ranks: int, order: str
) -> dict[str, float]:
    """Seconds of a causal forward by schedule. The ring overlaps compute and communication."""
    from tokenmill.distributed.plan import plan

    costs = plan(
        batch=1,
        length=length,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        ranks=ranks,
        itemsize=model.itemsize,
        causal=True,
        order=order,
    )
    link = machine.link
    found = {}
    for name, cost in costs.items():
        compute = cost.flops / machine.flops
        sent = cost.forward_bytes / link.bandwidth
        if name == "ring":
            step = compute / ranks
            each = link.latency + sent / max(ranks - 1, 1)
            found[name] = step + (ranks - 1) * max(step, each)
        elif name == "allgather":
            found[name] = compute + sent + (ranks - 1) * link.latency
        elif model.heads % ranks == 0:
            found[name] = compute + sent + cost.steps * link.latency * (ranks > 1)
    return found


def linear_seconds(model: Model, machine: Machine, length: int, ranks: int) -> float:
    """Seconds of a lightning attention forward: chunks of 64 tokens, and the states of all
    shards."""
    from tokenmill.distributed.plan import linear_bytes

    chunk = 64
    tokens = -(-length // ranks)
    flops = 4.0 * model.heads * tokens * model.head_dim * (model.head_dim + chunk / 2)
    if ranks > 1:
        flops += 2.0 * model.heads * tokens * model.head_dim**2  # final state of the shard
    sent = linear_bytes(1, model.heads, model.head_dim, model.head_dim, ranks)
    return (
        flops / machine.flops + sent / machine.link.bandwidth + (ranks > 1) * machine.link.latency
    )


def decode_seconds(model: Model, machine: Machine, length: int, ranks: int) -> float:
    """Seconds of one token over a cache of `length` keys."""
    from tokenmill.distributed.plan import decode_bytes

    cache = 2 * -(-length // ranks) * model.kv_heads * model.head_dim * model.itemsize
    sent = decode_bytes(1, 1, model.heads, model.head_dim, ranks)
    return (
        cache / machine.memory + sent / machine.link.bandwidth + (ranks > 1) * machine.link.latency
    )


Family = Callable[[Model, Machine, int, int], tuple[float, str]]


def best_attention(order: str) -> Family:
    def seconds(model: Model, machine: Machine, length: int, ranks: int) -> tuple[float, str]:
        found = attention_seconds(model, machine, length, ranks, order)
        name = min(found, key=lambda n: found[n])
        return found[name], name

    return seconds


FAMILIES: dict[str, Family] = {
    "causal attention, zigzag": best_attention("zigzag"),
    "causal attention, contiguous": best_attention("contiguous"),
    "lightning attention": lambda *x: (linear_seconds(*x), ""),
    "decode": lambda *x: (decode_seconds(*x), ""),
}


def efficiency(
    family: Family, model: Model, machine: Machine, length: int, ranks: int
) -> tuple[float, str]:
    """Parallel efficiency on P ranks, and the schedule."""
    seconds, how = family(model, machine, length, ranks)
    return family(model, machine, length, 1)[0] / (ranks * seconds), how


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--link", choices=tuple(LINKS), default="infiniband", help="a preset")
    parser.add_argument("--latency", type=_cli.seconds, help="seconds, instead of the preset's")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="instead of the preset's")
    parser.add_argument(
        "--tflops",
        type=float,
        help="of the kernel on one rank (default: measured here, one thread)",
    )
    parser.add_argument("--memory", type=float, metavar="GB/S", default=2000.0, help="of one rank")
    parser.add_argument("--heads", type=_cli.integer(1, 4096), default=32)
    parser.add_argument("--kv-heads", type=_cli.integer(1, 4096), default=8)
    parser.add_argument("--head-dim", type=_cli.integer(1, 256), default=128)
    parser.add_argument("--plot", metavar="FILE", help="draw the efficiencies as a PNG")


def run(options: argparse.Namespace) -> int:
    if options.heads % options.kv_heads:
        raise _cli.UsageError(
            f"--kv-heads: must divide {options.heads} heads; got {options.kv_heads}"
        )
    preset = LINKS[options.link]
    link = Link(
        preset.latency if options.latency is None else options.latency,
        preset.bandwidth if options.bandwidth is None else options.bandwidth * 1e9,
    )
    flops = measured_flops() if options.tflops is None else options.tflops * 1e12
    machine = Machine(flops, options.memory * 1e9, link)
    model = Model(options.heads, options.kv_heads, options.head_dim, 2)
    print(
        f"PREDICTION, not a measurement: {flops / 1e12:.3g} TFLOP/s and {options.memory:g} GB/s on "
        f"each rank, {link.bandwidth / 1e9:g} GB/s and {link.latency * 1e6:g} us between them; "
        f"H={model.heads} Hk={model.kv_heads} D={model.head_dim}, 16 bits, forward"
    )
    for name, family in FAMILIES.items():
        print(
            f"\n{name}: efficiency (schedule)\n{'tokens':>10} " + "".join(f"{p:>16}" for p in RANKS)
        )
        for length in LENGTHS:
            cells = [efficiency(family, model, machine, length, p) for p in RANKS]
            print(f"{length:>10} " + "".join(f"{f'{e:.0%} {how}':>16}" for e, how in cells))
    if options.plot:
        _draw(model, machine, Path(options.plot))
        print(f"\nwrote {options.plot}")
    return 0


def measured_flops() -> float:
    """Measured rate of causal attention in bfloat16 on one thread."""
    q = torch.randn(1, 2048, 4, 128, dtype=torch.bfloat16)
    timing = interleave(
        {"attention": lambda: attention(q, q, q, causal=True)}, threads=1, seconds=0.5
    )
    return 2.0 * 4 * 2048 * 2049 / 2 * 256 / timing["attention"].best


def _draw(model: Model, machine: Machine, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(FAMILIES), figsize=(16, 4), sharey=True, layout="constrained"
    )
    for axes, (name, family) in zip(panels, FAMILIES.items(), strict=True):
        for length in LENGTHS:
            values = [efficiency(family, model, machine, length, p)[0] for p in RANKS]
            axes.plot(RANKS, values, marker="o", label=f"{length:,} tokens")
        axes.set(title=name, xscale="log", xlabel="ranks", ylim=(0, 1.05))
    panels[0].set_ylabel("efficiency")
    panels[-1].legend()
    figure.suptitle("Prediction from kernel rate, bytes and link figures")
    figure.savefig(path, dpi=120)
    plt.close(figure)
