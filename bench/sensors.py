"""Clocks, power and temperature of the GPU while cases are measured, read by NVML."""

from __future__ import annotations

import time
from typing import Any

import torch

EVERY = 0.1  # seconds between readings
# NVML's clock-throttle reason bits that matter for a benchmark.
THROTTLED = {
    0x4: "power cap", 0x8: "slowdown of the hardware", 0x20: "temperature, by software",
    0x40: "temperature, by hardware", 0x80: "power brake",
}  # fmt: skip


class Sensors:
    """Reads between repetitions, never during one. Without NVML, `absent` holds the reason and a
    summary is empty."""

    def __init__(self, nvml: Any = None) -> None:
        self.absent = ""
        self._readings: list[dict[str, Any]] = []
        self._next = 0.0
        try:
            self._nvml = nvml or _nvml()
            self._nvml.nvmlInit()
            self._handle = _handle(self._nvml)
        except ImportError:
            self.absent = "pynvml is not installed (pip install nvidia-ml-py)"
        except Exception as error:  # NVMLError: no driver, no permission
            self.absent = f"NVML: {error}"

    def read(self, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        if self.absent or now < self._next:
            return
        self._next = now + EVERY
        nvml, handle = self._nvml, self._handle
        questions = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "throttled": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        }
        reading = {}
        for name, ask in questions.items():
            try:
                reading[name] = ask()
            except Exception:  # not every board supports every query
                continue
        self._readings.append(reading)

    def summary(self) -> dict[str, Any]:
        """Readings since the last summary: [min, max] of each, and the reasons for lower clocks."""
        readings, self._readings, self._next = self._readings, [], 0.0
        found: dict[str, Any] = {}
        for name in ("sm_mhz", "memory_mhz", "watts", "celsius"):
            values = [reading[name] for reading in readings if name in reading]
            if values:
                found[name] = [min(values), max(values)]
        bits = 0
        for reading in readings:
            bits |= reading.get("throttled", 0)
        if reasons := [text for bit, text in THROTTLED.items() if bits & bit]:
            found["throttled"] = reasons
        return found


def _nvml() -> Any:
    import pynvml

    return pynvml


def _handle(nvml: Any) -> Any:
    """NVML handle of torch's current device, independent of CUDA_VISIBLE_DEVICES."""
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None)
    if uuid is None:
        return nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
