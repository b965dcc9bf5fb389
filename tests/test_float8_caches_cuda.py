"""CUDA kernels on float8_e4m3fn caches and on latent heads, on the PTX machine: cases that the
samples of the operators do not reach."""

from __future__ import annotations

import pytest
import torch
from each import ints

import tokenmill as tm
from tokenmill import masks, registry
from tokenmill.dense.attention_decode_cases import decode_call
from tokenmill.registry import Sample
from tokenmill.sparse.sparse_decode_attention_cases import sparse_call
from tokenmill.testing import compare

pytestmark = pytest.mark.skipif(
    not tm._call.library.emulated_built(),
    reason="only a development build has the PTX machine (TOKENMILL_PTXVM=1)",
)
FLOAT8 = torch.float8_e4m3fn
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CODES = torch.arange(256, dtype=torch.uint8).view(FLOAT8)


def check(op, make, dtype):
    found = compare(registry.get(op), Sample("drawn", make), "emulated", dtype, device="cpu")
    assert not [c for c in found if not c.ok]


@each_dtype
@pytest.mark.parametrize("packed", [False, True])
def test_every_code_is_exact(packed, dtype):
    """Each code is the value of the only key of a row, and the only channel of a key that a query
    uses."""
    values = CODES.reshape(1, 1, 1, 256)
    q = torch.zeros(1, 1, 1, 8, dtype=dtype)
    call = {"seqlens_k": ints(1), "backend": "emulated"}
    if packed:
        q, call = q[0], {**call, "cu_seqlens_q": ints(0, 1)}
    out = tm.attention_decode(q, torch.zeros(1, 1, 1, 8).to(FLOAT8), values, **call)
    torch.testing.assert_close(out.flatten(), CODES.to(dtype), rtol=0, atol=0, equal_nan=True)
    q = torch.zeros(1, 1, 1, 20, dtype=dtype)
    q[..., 3] = 1
    keys = torch.zeros(1, 256, 1, 20).to(FLOAT8)
    keys[0, :, 0, 3] = CODES
    scores = tm.kv_block_scores(q, keys, scale=1.0, backend="emulated").flatten()
    torch.testing.assert_close(scores, CODES.float(), rtol=0, atol=0, equal_nan=True)


@each_dtype
@pytest.mark.parametrize("size", [2.0**-30, 1.0, 2.0**12])
@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "sigmoid", "score_bias": -3.0}, {"queries": (3, 18)}],
    ids=["softmax", "sigmoid", "packed"],
)
def test_scales_of_any_size(options, size, dtype):
    """The scales of values multiply weights to products beyond the float16 range."""
    draw = decode_call((40, 18), d=16, dv=24, capacity=40, float8=("token", "token"), **options)

    def make(to, g):
        args, kwargs = draw(to, g)
        scale = torch.exp2(torch.randint(-3, 4, kwargs["v_scale"].shape, generator=g).float())
        codes = (args[2].float() / 64).to(FLOAT8)
        return (*args[:2], codes), {**kwargs, "v_scale": (scale * size).to(kwargs["k_scale"])}

    if dtype == torch.float16 and size < 1:
        size = 2.0**-10  # results are subnormal below
    check("attention_decode", make, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("which", ["decode", "packed", "mask", "sparse"])
def test_hidden_scales_do_not_show(which, dtype):
    """Hidden scales belong to keys before the window, after a row's own key and outside the
    ranges."""
    options = {"sq": 3, "h": 4, "hk": 2, "d": 24, "dv": 24, "float8": ("token", "token")}
    length = 40
    if which == "sparse":
        args, kwargs = sparse_call((length,), lists=1, entries=4, num_recent=6, **options)(
            dtype, torch.Generator().manual_seed(0)
        )
        args[3][..., :4], args[4][:] = ints(2, 9, 17, 30), 4
        seen = torch.zeros(64, dtype=torch.bool)
        seen[[2, 9, 17, 30]] = seen[length - 8 : length] = True
        run = tm.sparse_decode_attention
    else:
        if which == "packed":
            options |= {"queries": (3,)}
        args, kwargs = decode_call((length,), **options)(dtype, torch.Generator().manual_seed(0))
        seen = torch.zeros(64, dtype=torch.bool)
        if which == "mask":
            kwargs["mask"] = masks.ranges(
                ints(5, 5, 5).reshape(1, 1, 3, 1), ints(20, 20, 20).reshape(1, 1, 3, 1)
            )
            seen[5:20] = True
        else:
            kwargs["window"] = (9, 0)
            seen[length - 12 : length] = True
        run = tm.attention_decode
    for name in ("k_scale", "v_scale"):
        kwargs[name] = kwargs[name].nan_to_num(1.0)
    args = [a.float().nan_to_num(1.0).to(FLOAT8) if a.dtype == FLOAT8 else a for a in args]
    want = run(*args, **kwargs, backend="emulated")
    for wrong in (NAN, INF):
        for name in ("k_scale", "v_scale"):
            kwargs[name] = torch.where(seen[None, :, None], kwargs[name], wrong)
        found = run(*args, **kwargs, backend="emulated")
        for f, w in zip(
            found if isinstance(found, tuple) else (found,),
            want if isinstance(want, tuple) else (want,),
            strict=True,
        ):
            assert torch.equal(f, w)


@each_dtype
@pytest.mark.parametrize("scales", [None, ("head", "token")], ids=["own dtype", "float8"])
@pytest.mark.parametrize(
    "options",
    [
        {"h": 20, "hk": 1, "d": 576, "dv": 512, "latent": True, "num_splits": 2},
        {"h": 4, "hk": 2, "d": 300, "dv": 44, "sq": 3, "page_size": 8, "window": (15, 0)},
    ],
    ids=["two tiles of rows", "other widths"],
)
def test_latent_heads(options, scales, dtype):
    make = decode_call((35, 0, 6), capacity=40, float8=scales, return_lse=True, **options)
    check("attention_decode", make, dtype)


@each_dtype
@pytest.mark.parametrize("scales", [None, ("token", "head")], ids=["own dtype", "float8"])
def test_latent_heads_of_lists(scales, dtype):
    make = sparse_call(
        (40, 3), h=3, hk=1, d=576, dv=512, lists=1, entries=9, capacity=48, num_sink=2,
        num_recent=5, pairs=32, float8=scales, latent=True, num_splits=2,
    )  # fmt: skip
    check("sparse_decode_attention", make, dtype)


@each_dtype
def test_extra_keys_beside_float8(dtype):
    """Extra keys have the dtype of q."""
    make = sparse_call(
        (40, 3), d=24, dv=20, entries=7, extra=5, pairs=6, float8=("token", "head"), num_recent=3
    )
    check("sparse_decode_attention", make, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scales", [None, ("head", "one")], ids=["own dtype", "float8"])
def test_little_shared_memory_will_do(scales, dtype):
    """A CTA has 99 KB, as on 8.6, 8.9 and 12.x."""
    options = {"hk": 1, "capacity": 24, "float8": scales}
    with tm.testing.emulated_cuda(device="sm_86"):
        latent = {"h": 3, "d": 576, "dv": 512, **options}
        check("attention_decode", decode_call((20,), **latent), dtype)
        check("sparse_decode_attention", sparse_call((20,), lists=1, entries=5, **latent), dtype)
        if scales:
            wide = {"h": 64, "d": 128, "dv": 128, **options}
            check("attention_decode", decode_call((20,), **wide), dtype)
            wide["d"] = 256
            check("attention_decode", decode_call((20,), queries=(5,), **wide), dtype)


def test_what_is_not_taken_says_so():
    g = torch.Generator().manual_seed(0)
    args, kwargs = decode_call((9,), queries=(2,), d=300, hk=1)(torch.float32, g)
    with pytest.raises(RuntimeError, match="beyond 256 its queries are causal and not packed"):
        tm.attention_decode(*args, **kwargs, backend="emulated")
