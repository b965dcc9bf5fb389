"""GPU timing, sensors, primitives and peers of the benchmarks, on a simulated device: no test
depends on a measured time."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest
import torch

import tokenmill as tm
from tokenmill.bench import (
    case,
    ceilings,
    gpu,
    measure,
    packages,
    primitives,
    primitives_cuda,
    sensors,
)
from tokenmill.bench.case import Absent, Case

MADE_UP = ceilings.Ceilings({"float32": 1e9}, ((1e9, 1e9),), "quick")


class Clock:
    """Events of a device on which time passes as its runs say."""

    def __init__(self):
        self.now, self.flushed, self.log = 0.0, 0, []

    def event(self):
        device = self

        class Event:
            def record(self):
                self.at = device.now
                device.log.append("record")

            def synchronize(self):
                device.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()

    def synchronize(self):
        self.log.append("synchronize")

    def flush(self):
        self.flushed += 1
        self.log.append("flush")

    def capture(self, run):
        if getattr(run, "syncs", False):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        run()

        def replay():
            before = self.now
            run()
            self.now = before + (self.now - before) / 2  # without the launches

        return replay

    def kernel_seconds(self, run):
        before = self.now
        run()
        if getattr(run, "untraced", False):
            raise RuntimeError("the profiler saw no kernel")
        return (self.now - before) / 4e3

    def takes(self, milliseconds, **facts):
        def call():
            self.log.append("run")
            self.now += milliseconds

        for name, value in facts.items():
            setattr(call, name, value)
        return call


def test_a_call_on_a_gpu_is_timed_alone_and_cold():
    device = Clock()
    assert gpu.event_seconds(device)(device.takes(3.0)) == 3e-3
    assert device.log == ["flush", "synchronize", "record", "run", "record", "wait"]


def test_three_times_of_a_gpu_and_what_is_missing():
    device = Clock()
    slow = device.takes(8.0, syncs=True, untraced=True)

    def fails():
        raise RuntimeError("no kernel image")

    case = Case(
        "gather_tokens", "c", torch.float32, 1.0, 1.0,
        lambda: (device.takes(4.0), {"slow": lambda: slow, "broken": lambda: fails}),
    )  # fmt: skip
    bench = measure.Bench(2, MADE_UP, device)
    row = measure.measure(case, bench, 0.0, False, lambda: None)
    assert (row["seconds"], row["graph"]["seconds"], row["kernels"]["seconds"]) == (
        4e-3,
        2e-3,
        1e-3,
    )
    assert row["graph"]["rounds"] == 5 and row["kernels"]["rounds"] == gpu.PROFILED
    other = row["peers"]["slow"]
    assert other["ratio"] == 2 and row["absent"] == {"broken": "RuntimeError: no kernel image"}
    assert other["graph"]["absent"] == "operation not permitted when stream is capturing"
    assert other["kernels"]["absent"] == "the profiler saw no kernel"
    limited = measure.measure(case, bench, 0.0, True, lambda: None)
    assert limited["rounds"] == 1 and limited["graph"] == {"absent": "no time was left"}
    assert limited["absent"]["slow"] == "no time was left"


class Nvml:
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self):
        self.watts = iter([100e3, 300e3, 200e3])

    def nvmlInit(self):
        pass

    def nvmlDeviceGetClockInfo(self, handle, which):
        assert handle == "the GPU"
        return {1: 1500, 2: 2600}[which]

    def nvmlDeviceGetPowerUsage(self, handle):
        return next(self.watts)

    def nvmlDeviceGetTemperature(self, handle, which):
        raise RuntimeError("not supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0x4 | 0x1


def test_sensors_are_read_between_repetitions(monkeypatch):
    monkeypatch.setattr(sensors, "_handle", lambda nvml: "the GPU")
    board = sensors.Sensors(Nvml())
    for now in (0.0, 0.01, 0.2, 0.4):  # the second comes too soon
        board.read(now)
    assert board.summary() == {
        "sm_mhz": [1500, 1500], "memory_mhz": [2600, 2600], "watts": [100, 300],
        "throttled": ["power cap"],
    }  # fmt: skip
    assert board.summary() == {}

    board = sensors.Sensors(Nvml())
    board.read(0.0)  # 100 W, for a case that failed
    made = Case("op", "case", torch.float32, 1.0, 1.0, lambda: (lambda: None, {}))
    bench = measure.Bench(1, MADE_UP, sensors=board)
    row = measure.measure(made, bench, 0.0, False, lambda: None)
    assert row["sensors"]["watts"][0] >= 200


def test_sensors_say_why_they_are_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    board = sensors.Sensors()
    assert board.absent == "pynvml is not installed (pip install nvidia-ml-py)"
    board.read()
    assert board.summary() == {}


def test_primitives_of_a_gpu_are_asked_of_torch():
    """Runs on CPU tensors and a clock that only events advance."""

    class Ticking(Clock):
        def synchronize(self):
            self.now += 1.0

        def capture(self, run):
            run()
            return run

        def event(self):
            self.now += 1.0
            return super().event()

    class Passing(Ticking):
        def event(self):
            event = super().event()
            event.elapsed_time = lambda end: 1.0
            return event

    sizes = primitives_cuda.Sizes(
        64, 64, product=32, updates=4, launches=2, multiprocessors=2, steps=2
    )
    probes = [*primitives_cuda.probes(Passing(), "cpu", sizes)]
    rows = {probe.title: primitives.measured(probe, 0.0) for probe in probes}
    assert len(rows) == len(probes)
    absent = {title: row["absent"] for title, row in rows.items() if "absent" in row}
    own = {"shared memory read", "exp2", "grid barrier"}
    assert {rows[title]["primitive"] for title in absent} - {"matmul"} == own
    refused = absent["grid barrier, a block for each multiprocessor"]
    assert refused == "RuntimeError: tokenmill.gpu_probe: x: must be on CUDA; got 'cpu'"
    assert rows["copy 128 B, cold"]["value"] == 128 / 1e-3
    assert rows["matmul float16"]["value"] == 2 * 32**3 / 1e-3
    found = ceilings.from_primitives(rows.values(), "cuda", 1)
    assert found.memory == 128e3 and found.flops["float32"] == 2 * 32**3 / 1e-3


# Peers


@pytest.fixture
def probe():
    """gpu_probe on the PTX machine."""
    if not tm._call.library.emulated_built():
        pytest.skip("needs a development build")
    return torch.ops.tokenmill_emulated.gpu_probe


def test_probes_do_what_they_count(probe):
    """Every CTA and thread has the result of all steps."""
    x = torch.arange(1024.0)
    for steps in (0, 1, 9):
        read = probe(x, of="shared", blocks=2, steps=steps)
        quads = x.view(256, 4).sum(1)
        expected = sum((quads.roll(-s) for s in range(steps)), torch.zeros(256))
        torch.testing.assert_close(read, expected.expand(2, 256))
        met = probe(x, of="barrier", blocks=3, steps=steps)
        last = (torch.arange(3.0) + steps) % 3 + steps
        torch.testing.assert_close(met, last[:, None].expand(3, 256))
    y = torch.linspace(0, 1, 1024)
    chained = y.repeat(2).view(256, 8)
    for _ in range(3):
        chained = torch.exp2(-chained)
    found = probe(y, of="exp2", blocks=2, steps=3)
    torch.testing.assert_close(found, chained.sum(1).expand(2, 256), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(8), {}, "x: must have shape [1024]; got [8]"),
        (torch.zeros(1024).half(), {}, "x: must be float32; got float16"),
        (torch.zeros(2048)[::2], {}, "x: must "),
        (torch.zeros(1024), {"of": "tea"}, "of: must be 'shared', 'exp2' or 'barrier'; got 'tea'"),
        (torch.zeros(1024), {"blocks": 0}, "blocks: must be 1 to 2^20; got 0"),
        (torch.zeros(1024), {"steps": -1}, "steps: must be 0 to 2^20; got -1"),
        (torch.zeros(1024), {"of": "barrier", "blocks": 5000}, "blocks: must be at most the "),
    ],
)
def test_probes_refuse_what_they_cannot_do(probe, x, options, message):
    with pytest.raises(RuntimeError) as error:
        probe(x, **options)
    assert "tokenmill.gpu_probe: " in str(error.value) and message in str(error.value)


def test_peers_are_listed_with_the_reason_why_they_are_absent(monkeypatch):
    assert "sdpa flash" not in packages.status("cpu") and "OpenVINO" not in packages.status("cuda")
    monkeypatch.setattr(packages, "_installed", lambda peer: peer.module.startswith("torch"))
    found = packages.status("cuda")
    assert found["flash-attn"] == "absent (not installed: pip install flash-attn)"
    assert found["sdpa flash"] == found["flex"] == importlib.metadata.version("torch")


def test_a_peer_is_timed_at_the_same_task_or_not_at_all(monkeypatch):
    q, k, v = torch.randn(3, 1, 8, 2, 16).unbind()
    ours = packages._sdpa("MATH")(causal=True, left=-1)
    made = {
        "same": ours,
        "other": lambda q, k, v: v,
        "narrow": lambda q, k, v: v[..., :1],
    }
    calls = {"attention": lambda name: lambda **options: made[name]}
    every = [
        packages.Peer(name, "torch", "torch", {"attention": calls["attention"](name)})
        for name in made
    ]
    every.append(packages.Peer("gone", "no_such_module", "gone", {"attention": None}))
    monkeypatch.setattr(packages, "PEERS", every)

    wrapped = []

    def built():
        def wrap(forward, tensors):
            return lambda: wrapped.append(1) or forward(*tensors)

        return packages.builders(
            "attention", [q, k, v], lambda: ours(q, k, v), wrap, causal=True, left=-1
        )

    assert built() == {}  # on a CPU
    monkeypatch.setattr(case, "device", types.SimpleNamespace(type="cuda"))
    found = built()
    run = found["same"]()
    assert wrapped == [1]  # it ran once, which compiles
    torch.testing.assert_close(run(), ours(q, k, v))
    for name, why in (
        ("other", "another result: "),
        ("narrow", "another result: shape"),
        ("gone", "not installed"),
    ):
        with pytest.raises(Absent, match=why):
            found[name]()
    with pytest.raises(Absent, match="no window"):
        packages._sdpa("MATH")(causal=True, left=3)
