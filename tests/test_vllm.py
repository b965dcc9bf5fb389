"""The vLLM backend, on a stand-in for vLLM's modules and its engine loop.

vLLM is not installed where these tests run. The stand-in has the names and signatures of
vllm.v1.attention.backend and of its registry in vLLM 0.22, and nothing else.
"""

from __future__ import annotations

import enum
import importlib
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tokenmill as tm

HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 2, 16, 4, 24
NAMES = ("_vllm_backend", "vllm")


class AttentionType(str, enum.Enum):
    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


class AttentionBackend:
    supported_kv_cache_dtypes = ("auto",)
    forward_includes_kv_cache_update = True

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype):
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @staticmethod
    def get_supported_kernel_block_sizes():
        return [1]


class AttentionImpl:
    pass


class AttentionMetadataBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.device = device


class Registry:
    def __init__(self, path=None):
        self.path = path

    def is_overridden(self):
        return self.path is not None

    def get_path(self):
        return self.path

    def register_backend(self, backend, class_path=None):
        assert backend is self
        self.path = class_path


@pytest.fixture
def custom(monkeypatch):
    """A module tree of vLLM; returns CUSTOM of the registry."""
    for name in [*sys.modules]:
        if name.split(".")[0] == "vllm":
            monkeypatch.delitem(sys.modules, name)
    member = Registry()
    parts = ("vllm", "v1", "attention", "backends")
    for i in range(len(parts)):
        name = ".".join(parts[: i + 1])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    backend = types.ModuleType("vllm.v1.attention.backend")
    for part in (AttentionType, AttentionBackend, AttentionImpl, AttentionMetadataBuilder):
        setattr(backend, part.__name__, part)
    registry = types.ModuleType("vllm.v1.attention.backends.registry")
    registry.AttentionBackendEnum = SimpleNamespace(CUSTOM=member)
    registry.register_backend = member.register_backend
    for module in (backend, registry):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in NAMES:
        monkeypatch.delitem(sys.modules, f"tokenmill.integrations.{name}", raising=False)
    yield member
    for name in NAMES:
        sys.modules.pop(f"tokenmill.integrations.{name}", None)


def load(custom):
    """Loads the backend as vLLM does: the plugin's function, then the class by its path."""
    importlib.import_module("tokenmill.integrations.vllm").register()
    module, name = custom.get_path().rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


class Request:
    """Keys and values of all tokens that a request will have, and its pages."""

    def __init__(self, prompt, new):
        self.prompt, self.length = prompt, prompt + new
        self.q = torch.randn(self.length, HEADS, DIM)
        self.k, self.v = torch.randn(2, self.length, KV_HEADS, DIM)
        self.pages, self.done = [], 0


def serve(backend, impl, layer, requests, dtype=torch.float32, budget=9):
    """Steps of at most budget tokens: decode rows first, then as much of a prompt as fits. Yields
    each finished request, with the outputs of all its tokens."""
    builder = backend.get_builder_cls()(None, ["0"], None, torch.device("cpu"))
    shape = backend.get_kv_cache_shape(PAGES, PAGE, KV_HEADS, DIM)
    cache = torch.zeros(shape, dtype=dtype)
    free, waiting, running = list(torch.randperm(PAGES).tolist()), [*requests], []
    outputs = {request: [] for request in requests}
    mixed = uniform = 0
    while waiting or running:
        while waiting and len(running) < 3:
            running.append(waiting.pop(0))
        room, step = budget, []
        for request in sorted(running, key=lambda r: r.done < r.prompt):  # decode first
            left = request.prompt if request.done < request.prompt else request.done + 1
            count = min(room, left - request.done)
            if count:
                step.append((request, count))
                room -= count
        for request, count in step:
            while len(request.pages) * PAGE < request.done + count:
                request.pages.append(free.pop())
        counts = [count for _, count in step]
        mixed += len({count > 1 for count in counts}) == 2
        uniform += {*counts} == {1}
        places = [range(r.done, r.done + n) for r, n in step]
        slots = [
            r.pages[p // PAGE] * PAGE + p % PAGE
            for (r, _), at in zip(step, places, strict=True)
            for p in at
        ]
        table = torch.full((len(step), 8), -1, dtype=torch.int32)
        for row, (request, _) in zip(table, step, strict=True):
            row[: len(request.pages)] = torch.tensor(request.pages)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        common = SimpleNamespace(
            query_start_loc=starts, query_start_loc_cpu=starts, num_reqs=len(step),
            seq_lens=torch.tensor([r.done + n for r, n in step], dtype=torch.int32),
            num_actual_tokens=len(slots), max_query_len=max(counts),
            max_seq_len=max(r.done + n for r, n in step), block_table_tensor=table,
            slot_mapping=torch.tensor(slots), causal=True,
        )  # fmt: skip
        metadata = builder.build(0, common)
        q, k, v = (
            torch.cat([getattr(r, name)[r.done : r.done + n] for r, n in step]) for name in "qkv"
        )
        padding = torch.zeros(2, HEADS, DIM)  # as vLLM pads
        q, k, v = (torch.cat([x, padding[:, : x.shape[1]]]) for x in (q, k, v))
        out = torch.full((len(q), HEADS * DIM), 7.0)
        impl.do_kv_cache_update(layer, k, v, cache, metadata.slot_mapping)
        assert impl.forward(layer, q, k, v, cache, metadata, out) is out
        assert (out[-2:] == 7).all()
        parts = out[:-2].view(-1, HEADS, DIM).split(counts)
        for (request, n), rows in zip(step, parts, strict=True):
            outputs[request].append(rows.clone())
            request.done += n
            if request.done == request.length:
                running.remove(request)
                free += request.pages
    assert mixed > 2 and uniform > 2 and sorted(free) == list(range(PAGES))
    return [torch.cat(outputs[request]) for request in requests]


def dense(request, window=None, softcap=0.0, sink=None, slopes=None, scale=None):
    """Attention of a single request, in float64."""
    q, k, v = (x.double() for x in (request.q, request.k, request.v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or DIM**-0.5)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(request.length)[:, None] - torch.arange(request.length)
    if slopes is not None:
        scores = scores - torch.tensor(slopes)[:, None, None] * distance
    hidden = (distance < 0) | (distance >= (window or request.length))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.double()[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : request.length], v)


CASES = {
    "plain": ({}, {}),
    "window, cap, sink": (
        {"sliding_window": 6, "logits_soft_cap": 2.0, "sinks": torch.arange(4.0)},
        {"window": 6, "softcap": 2.0, "sink": torch.arange(4.0)},
    ),
    "alibi": ({"alibi_slopes": [0.5, 0.25, 0.1, 0.0]}, {"slopes": [0.5, 0.25, 0.1, 0.0]}),
    "float8": ({"kv_cache_dtype": "fp8"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_engine_that_serves_requests(case, custom):
    """Prompts in chunks together with decode rows, in pages released by earlier requests."""
    backend = load(custom)
    options, meaning = CASES[case]
    impl = backend.get_impl_cls()(HEADS, DIM, 0.3, KV_HEADS, **options)
    layer = SimpleNamespace(_k_scale=torch.tensor(0.02), _v_scale=torch.tensor(0.01))
    requests = [Request(*sizes) for sizes in ((17, 5), (3, 9), (1, 4), (12, 3), (20, 2))]
    eight = case == "float8"
    found = serve(backend, impl, layer, requests, torch.uint8 if eight else torch.float32)
    for request, out in zip(requests, found, strict=True):
        if eight:
            for name, scale in (("k", 0.02), ("v", 0.01)):
                rounded = (getattr(request, name) / scale).to(torch.float8_e4m3fn)
                setattr(request, name, rounded.float() * scale)
        expected = dense(request, scale=0.3, **meaning)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_encoders_profiling_runs_and_what_is_refused(custom):
    backend = load(custom)
    impl = backend.get_impl_cls()(HEADS, DIM, 0.25, KV_HEADS, attn_type=AttentionType.ENCODER_ONLY)
    q, (k, v) = torch.randn(9, HEADS, DIM), torch.randn(2, 9, KV_HEADS, DIM)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    metadata = SimpleNamespace(num_actual_tokens=9, max_query_len=5, query_start_loc=starts)
    out = impl.forward(None, q, k, v, torch.empty(0), metadata, torch.empty_like(q))
    assert torch.equal(out, tm.attention(q, k, v, cu_seqlens_q=starts, max_seqlen_q=5, scale=0.25))
    assert (impl.forward(None, q, k, v, torch.empty(0), None, out) == 0).all()
    with pytest.raises(NotImplementedError, match="output_scale"):
        impl.forward(None, q, k, v, None, metadata, out, output_scale=torch.ones(1))
    with pytest.raises(NotImplementedError, match="attn_type"):
        backend.get_impl_cls()(4, 16, 1.0, attn_type=AttentionType.ENCODER_DECODER)
    with pytest.raises(NotImplementedError, match=r"kv_cache_dtype: .*; got fp8_e5m2"):
        backend.get_impl_cls()(4, 16, 1.0, kv_cache_dtype="fp8_e5m2")
    assert 528 not in backend.get_supported_kernel_block_sizes()  # vLLM divides it into these
    assert backend.supports_head_size(80) and not backend.supports_head_size(257)
    assert not backend.supports_compute_capability(SimpleNamespace(major=7, minor=5))
    builder = backend.get_builder_cls()(None, [], None, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="causal"):
        builder.build(0, SimpleNamespace(causal=torch.ones(2)))


def test_registration_leaves_others_alone(custom, monkeypatch):
    module = importlib.import_module("tokenmill.integrations.vllm")
    custom.path = "another.Backend"
    with pytest.warns(UserWarning, match=r"CUSTOM is taken by another\.Backend"):
        module.register()
    assert custom.path == "another.Backend"
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    with pytest.warns(UserWarning, match=r"needs vLLM 0\.22"):
        module.register()


def test_without_vllm_nothing_is_imported_and_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in NAMES:
        monkeypatch.delitem(sys.modules, f"tokenmill.integrations.{name}", raising=False)
    module = importlib.import_module("tokenmill.integrations.vllm")
    assert "tokenmill.integrations._vllm_backend" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match=r"needs vllm: pip install 'tokenmill\[vllm\]'"):
        module.register()


def test_the_entry_point_names_the_function():
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("the project's metadata are not beside the tests")
    group = project.read_text().split('"vllm.general_plugins"]')[1]
    assert re.match(r'\s*tokenmill = "tokenmill_vllm:register"', group)


IN_A_PROCESS_OF_VLLM = """
import sys, types
before = set(sys.modules)
for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
    sys.modules[name] = types.ModuleType(name)
found = []
registry = types.ModuleType("vllm.v1.attention.backends.registry")
custom = types.SimpleNamespace(is_overridden=lambda: False)
registry.AttentionBackendEnum = types.SimpleNamespace(CUSTOM=custom)
registry.register_backend = lambda member, path: found.append(path)
sys.modules[registry.__name__] = registry
import tokenmill_vllm
tokenmill_vllm.register()
assert found == ["tokenmill.integrations._vllm_backend.TokenmillBackend"], found
ours = {name for name in set(sys.modules) - before if not name.startswith("vllm")}
assert ours <= {"tokenmill_vllm", "__future__", "warnings"}, ours
"""


def test_a_process_that_does_not_choose_the_backend_imports_nothing():
    """vLLM calls the entry point in all of its processes: neither torch nor the package loads."""
    folder = Path(importlib.import_module("tokenmill_vllm").__file__).resolve().parent
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})"]
    command[-1] += IN_A_PROCESS_OF_VLLM
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
