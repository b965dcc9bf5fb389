"""Non-tensor arguments that the public functions accept and refuse."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from conftest import device_of
from each import each_backend, ints
from test_contract import each_spec, outputs, same_bits

import tokenmill as tm
from tokenmill import registry
from tokenmill.testing import map_tensors

HUGE = 2**63 - 1


def composites():
    """A call of each public function that is composed of operators."""
    q, k = torch.randn(2, 20, 4, 8), torch.randn(2, 20, 2, 8)
    assign = ints([0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 1, 2])
    return {
        tm.sigmoid_attention: ((q, k, k), {}),
        tm.lightning_attention: ((q, k, k, torch.rand(4)), {}),
        tm.lightning_slopes: ((4, 0, 2), {}),
        tm.token_select: ((q[:, :1], k), {"k": 4}),
        tm.indexer_kl_loss: (
            (
                q,
                k[:, :, 0],
                torch.rand(2, 20, 4),
                ints([0, 3]).expand(2, 20, 2),
                ints([2]).expand(2, 20),
                torch.rand(2, 20, 2),
            ),
            {},
        ),
        tm.core_context_attention: ((q, k, k), {"group": 4, "window": 8}),
        tm.hip_attention: ((q, k, k), {"budget": 8, "block_q": 8}),
        tm.moba_attention: ((q, k, k), {"block": 4}),
        tm.native_sparse_attention: (
            (q, k, k, torch.rand(2, 20, 4, 3)),
            {"block": 4, "stride": 2, "select_block": 4, "topk": 3},
        ),
        tm.landmark_attention: ((q, k, k), {"block": 8}),
        tm.landmark_decode: ((q[:, :1], k, k), {"seqlens_k": ints(20, 3), "block": 8}),
        tm.bipartite_match: ((torch.randn(2, 20, 8), 4), {}),
        tm.merge_tokens: ((torch.randn(2, 6, 8), assign, 3), {}),
        tm.unmerge_tokens: ((torch.randn(2, 3, 8), assign), {}),
    }


HOSTILE = [
    None, True, -1, 3, 2**31, 2**40, 2**64, 10**400, 0.5, float("nan"), 1j, "nonsense", b"x", (),
    {}, [[1], [2, [3]]], (1, None), object(), np.zeros(3), np.bool_(True), torch.zeros(()),
    torch.zeros(2, 3), torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3, 4, 8, device="meta"),
    torch.zeros(2, 20, 4, 8, dtype=torch.int64), torch.zeros(2, 0, 4, 8), [torch.zeros(2, 3), None],
]  # fmt: skip


@pytest.mark.parametrize("function", composites(), ids=lambda f: f.__name__)
def test_errors_of_composites_are_of_the_package(function):
    """The same property as test_no_argument_crashes, for functions composed of operators."""
    args, kwargs = composites()[function]
    function(*args, **kwargs)
    for at, name in enumerate(inspect.signature(function).parameters):
        for value in HOSTILE if name != "options" else ():
            edited = (*args[:at], value, *args[at + 1 :]) if at < len(args) else args
            options = kwargs if at < len(args) else {**kwargs, name: value}
            try:
                function(*edited, **options)
            except (RuntimeError, TypeError, ValueError) as error:
                assert str(error).startswith("tokenmill."), (name, value)


def as_numpy(value):
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, tuple | list):
        return type(value)(as_numpy(v) for v in value)
    if isinstance(value, int):
        return np.int64(value)
    if isinstance(value, float):
        return np.float32(value) if float(np.float32(value)) == value else np.float64(value)
    return value


@each_spec
def test_numpy_scalars_are_numbers(spec):
    for sample in spec.samples[:4]:
        args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
        twice = map_tensors((args, kwargs), torch.clone)
        want = outputs(spec.function(*args, **kwargs))
        args, kwargs = twice
        kwargs = {name: as_numpy(value) for name, value in kwargs.items()}
        assert same_bits(want, outputs(spec.function(*map(as_numpy, args), **kwargs)))


def test_numpy_numbers_of_every_kind():
    q = torch.randn(1, 9, 2, 8)
    want = tm.attention(q, q, q, scale=0.5, window=(3, 0))
    for whole in (np.int8, np.uint64, np.array):
        window = whole(3), whole(0)
        for scale in (np.float16(0.5), np.float32(0.5)):
            assert torch.equal(tm.attention(q, q, q, scale=scale, window=window), want)


FLAGS = [
    (function, name)
    for function in [*(spec.function for spec in registry.ops().values()), *composites()]
    for name, parameter in inspect.signature(function).parameters.items()
    if isinstance(parameter.default, bool)
]


@pytest.mark.parametrize(("function", "name"), FLAGS, ids=[f"{f.__name__}-{n}" for f, n in FLAGS])
def test_flags_are_bools(function, name):
    if function in composites():
        args, kwargs = composites()[function]
    else:
        sample = registry.get(function.__name__).samples[0]
        args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
    for value, shown in (("no", "'no'"), (1, "1"), (None, "None"), (np.bool_(True), "True")):
        rule = rf"^tokenmill\.\w+: {name}: must be a bool; got {shown}$"
        with pytest.raises(RuntimeError, match=rule):
            function(*args, **{**kwargs, name: value})


@each_backend
def test_more_than_there_is_means_all(backend):
    """Sums with the largest integers do not wrap."""
    q, k = torch.randn(2, 20, 4, 8), torch.randn(2, 20, 2, 8)
    lists = torch.arange(3, dtype=torch.int32).expand(2, 1, 5, 3), torch.full((2, 1, 5), 3).int()
    listed = torch.arange(2, dtype=torch.int32).expand(2, 2, 2), torch.full((2, 2), 2).int()
    ends = {"num_sink": 50, "num_recent": 50}
    calls = [
        (tm.attention, (q, k, k), {"window": (50, 50)}),
        (tm.attention_decode, (q[:, :1], k, k), {"seqlens_k": ints(20, 7), "window": (50, -1)}),
        (tm.sparse_decode_attention, (q[:, :1], k, k, *listed), {"seqlens_k": ints(20, 7), **ends}),
        (
            tm.block_sparse_attention,
            (q, k, k, *lists),
            {"block_q": 4, "block_k": 4, "causal": True, "num_recent": 50},
        ),
        (tm.kv_block_scores, (q, k), ends),
        (tm.hip_block_select, (q, k), {"budget": 4, "block_q": 4, **ends}),
        (tm.indexer_topk_select, (q, k[:, :, 0], q.sum(-1), 4), ends),
    ]
    for function, args, options in calls:
        args, options = map_tensors((args, options), lambda t: t.to(device_of(backend)))
        maximum = {n: HUGE if isinstance(o, int) and o == 50 else o for n, o in options.items()}
        if "window" in maximum:
            maximum["window"] = tuple(HUGE if w == 50 else w for w in options["window"])
        want = outputs(function(*args, backend=backend, **options))
        assert same_bits(want, outputs(function(*args, backend=backend, **maximum))), function


def test_a_short_rope_table_is_refused_however_many_keys_are_recent():
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 20, 2, 8)
    none = torch.zeros(1, 1, 0, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"rope: must have shape \[positions, pairs\], 20 posi"):
        tm.sparse_decode_attention(
            q, k, k, *none, seqlens_k=ints(20), num_sink=HUGE, num_recent=HUGE, pos_mode="cache",
            rope=(torch.ones(1, 4), torch.zeros(1, 4)),
        )  # fmt: skip


def test_what_no_tensor_bounds_has_a_limit():
    q = torch.randn(1, 20, 2, 8)
    with pytest.raises(RuntimeError, match="iters: must be 1 to 1000; got 1099511627776"):
        tm.cluster_tokens(torch.randn(1, 4, 4, 2), 2, iters=2**40, tau=0.1)
    with pytest.raises(RuntimeError, match="num_heads: must be 1 to 65536; got 2147483648"):
        tm.lightning_slopes(2**31)
    for block in (2**40, 2**63 - 1):
        with pytest.raises(RuntimeError, match=f"block: must be 2 to 2\\^31 - 1; got {block}"):
            tm.landmark_decode(q[:, :1], q, q, seqlens_k=ints(20), block=block)
    want = tm.landmark_decode(q[:, :1], q, q, seqlens_k=ints(20), block=32)
    found = tm.landmark_decode(q[:, :1], q, q, seqlens_k=ints(20), block=2**31 - 1)
    torch.testing.assert_close(found, want)
    wide = tm.sparse.CoreContextState(group=4, window=2**30)
    narrow = tm.sparse.CoreContextState(group=4, window=128)
    for state in (wide, narrow):
        state.prefill(q[:, :3], q[:, :3], q[:, :3])
    for i in range(100):
        token = q[:, i % 20, None]
        assert torch.equal(wide.step(token, token, token), narrow.step(token, token, token))


SCORES = torch.randn(1, 3, 4)


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (tm.topk_select, (SCORES[0],), "missing .*'k'"),
        (tm.best_match, (SCORES,), "missing .*'b'"),
        (tm.best_match, (SCORES, SCORES, True), "positional argument"),
        (tm.mask_partition, (SCORES[0] > 0, 5), "positional argument"),
        (tm.titans_memory, (SCORES[None],) * 3, "missing .*'alpha'"),
        (tm.block_sparse_attention, (SCORES[None],) * 5, "missing .*'block_q'"),
    ],
)
def test_a_call_and_its_explanation_want_the_same_arguments(function, args, message):
    for run in (function, lambda *a: tm.explain(function.__name__, *a)):
        with pytest.raises(TypeError, match=message):
            run(*args)
