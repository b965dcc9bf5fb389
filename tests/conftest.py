from __future__ import annotations

import gc
import importlib.util
import os

# NumPy computes the products of Triton's interpreter. Two threads that wait for each other on busy
# cores take 100 times as long as one thread for a product of tiles.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["TOKENMILL_TUNE_CACHE"] = os.devnull  # default knobs of an untuned machine

from hypothesis import HealthCheck, settings
from shares import pytest_terminal_summary  # noqa: F401 a hook
from tier import QUICK
from triton_compiler import compiles_once, processes, programs  # noqa: F401 fixtures

import tokenmill as tm
import tokenmill._emulator

SEED = os.environ.get("TOKENMILL_TEST_SEED")  # of drawn calls; unset: fixed calls
settings.register_profile(
    "tokenmill",
    deadline=None,
    print_blob=True,
    derandomize=SEED is None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tokenmill")

if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.hasten()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_selected: list[str] = []


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        choices=tm._call.choose.ALL_BACKENDS,
        help="test this backend (repeatable; default: all that this machine has)",
    )


@pytest.hookimpl(tryfirst=True)  # Hypothesis reads its option in this hook
def pytest_configure(config):
    if SEED is not None:
        config.option.hypothesis_seed = SEED
    _selected[:] = config.getoption("--backend")
    if (
        tm._call.library.emulated_built()
    ):  # detect races and uninitialized values, in addition to bounds
        tm._emulator.configure("check=1")


def pytest_collection_finish(session):
    """Tens of thousands of tests live as long as the session: freezes them for the garbage
    collector."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


def backends(*others: str) -> list[str]:
    """The kernels that this machine can run, and others, restricted by --backend."""
    states = tm.backends()
    able = [b for b, state in states.items() if state.startswith(("available", "interpreter"))]
    found = [b for b in able if b != "reference"] + list(others)
    return [b for b in found if not _selected or b in _selected]


def device_of(backend: str) -> str:
    return "cpu" if backend in ("cpu", "emulated", "reference") else DEVICE


def assert_same(found, wanted, backend: str) -> None:
    """Asserts equal bits. For the reference only values are compared: its products use torch's
    BLAS, whose summation order depends on shapes and strides, so two of its results may each differ
    by two floors of the error budget."""
    if isinstance(found, torch.Tensor):
        found, wanted = (found,), (wanted,)
    for x, y in zip(found, wanted, strict=True):
        if backend != "reference" or not x.is_floating_point():
            assert torch.equal(x, y)
        else:
            assert tm.testing.error(x, y) <= 4 * tm.testing.FORWARD_FLOOR[x.dtype]


def cpu_variants() -> list[tuple[str, str | None]]:
    """(backend, instruction set) of every kernel; None for backends without instruction sets."""
    others: list[tuple[str, str | None]] = [(b, None) for b in backends() if b != "cpu"]
    sets = tm.testing.cpu_isas() if "cpu" in backends() else []
    return [("cpu", isa) for isa in (sets[-1:] if QUICK else sets)] + others


def in_each_dtype(dtypes, variants):
    """Parameters (dtype, *variant) of shape tests. Triton's interpreter runs the same programs for
    every dtype and takes only the first one: the contract and drawn calls cover all."""
    return [
        pytest.param(dtype, *variant, id="-".join(map(str, (dtype, *variant))))
        for dtype in dtypes
        for variant in variants
        if dtype == dtypes[0] or variant[0] != "triton" or DEVICE == "cuda"
    ]


@pytest.fixture(autouse=True)
def _one_thread(request):
    """One thread of torch for tests of a backend that has none of its own: with a worker on each
    core a second thread only waits. Tests of the CPU kernels keep the threads of the machine."""
    called = getattr(request.node, "callspec", None)
    backend = called.params.get("backend") if called else None
    if backend not in ("triton", "emulated", "reference") or device_of(backend) != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fills torch.empty with NaN, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def isa(request):
    """Indirect parameter: instruction set to run, or None."""
    if request.param is None:
        yield None
        return
    with tm.testing.cpu_isa(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks():
    """Returns a group of gloo processes of a given size, started on first use."""
    from ranks import Ranks

    groups: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        if size not in groups or not all(p.is_alive() for p in groups[size].processes):
            groups[size] = Ranks(size)
        return groups[size]

    yield of
    for group in groups.values():
        group.close()
