"""Triton specifics of attention: the code that its compiler generates, and memory that no length
may reach. tests/test_contract.py and test_attention.py check the results."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from tier import daily
from triton_compiler import assert_fits, assert_multiplies

import tokenmill as tm
from tokenmill.dense.attention import BACKWARD, EXTRAS, FORWARD, SPEC

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# kind and normalize, dtype, head_dim, band; --full: every dtype with both head_dims. Row sums in
# float32 and unbounded weights in float16 use most registers; relu, with --full, recomputes NaN
# rows.
CASES = daily(
    "sigmoid:bfloat16:64:window",
    "softmax:bfloat16:128:causal",
    "softmax:float32:128:plain",
    "softmax:float16:64:causal:every term",
    "taylor2,sum:float32:64:causal",
    "elu1,sum:float16:64:window:every term:masked",
    "softmax:float16:64:plain:fading",
    full=(
        "softmax:float16:64:causal",
        "sigmoid:float16:128:plain",
        "sigmoid:float32:64:causal",
        "elu1,sum:float16:64:window:every term",
        "relu,count:bfloat16:128:plain",
        "softmax:float16:64:causal:masked",
    ),
)
LISTS = ("key_tiles_kernel", "query_tiles_kernel")
BANDS = {
    "plain": (False, -1, -1),
    "causal": (True, -1, -1),
    "window": (False, 100, 20),
}


def lowered(case, tokens=1024):
    """A call of attention on meta tensors."""
    kind, dtype, head_dim, band, *options = case.split(":")
    dtype, head_dim = getattr(torch, dtype), int(head_dim)
    batch, heads, kv_heads = 2, 8, 2
    empty = functools.partial(torch.empty, device="meta")
    q = empty(batch, tokens, heads, head_dim, dtype=dtype)
    k = empty(batch, tokens, kv_heads, head_dim, dtype=dtype)
    given = {"q": q, "k": k, "v": k, "scale": 0.125}
    given |= dict(zip(("kind", "normalize"), kind.split(","), strict=False))
    given |= dict(zip(("causal", "window_left", "window_right"), BANDS[band], strict=True))
    if "masked" in options:  # the largest mask
        spans = empty(batch, tokens, 2, dtype=torch.int32)
        ranges = empty(batch, heads, tokens, 4, 2, dtype=torch.int32)
        given |= {"mask_ranges": ranges, "mask_q_spans": spans, "mask_k_spans": spans}
    if "fading" in options:
        given |= {"alibi_slopes": empty(heads), "grid_width": 32, "grid_window": 9}
        given |= {"post_decay": True}
    if "every term" in options:
        given |= {"score_bias": empty(batch, heads), "score_bias_value": -1.0, "softcap": 5.0}
        given |= {"score_bias_neg_log_n": True, "alibi_slopes": empty(heads)}
        given |= {"bias": empty(batch, 1, tokens, tokens, dtype=dtype)}
        given |= {"sink": empty(heads)} if kind == "softmax" else {}
    return FORWARD.record(**FORWARD.defaults | given)


def call(case, *sizes):
    from tokenmill.triton_kernels.dense import attention

    def launch():
        a = lowered(case, *sizes)
        out, lse = attention.attention(a)
        lse = None if lse.numel() == 0 else lse
        kept = out if a.kind == "softmax" or a.normalize == "sum" else None
        needs = [True] * len(EXTRAS)
        attention.attention_backward(BACKWARD.record(out, lse, kept, lse, *needs, *a))

    return launch


def test_every_kernel_compiles_without_spilling_registers(programs):
    biased = [c for c in CASES if "every term" in c]  # dbias has its own kernel
    masked = [c for c in CASES if "masked" in c]  # each has a kernel that builds its lists
    assert len(programs) == 3 * len(CASES) + len(biased) + 3 * len(masked)
    for program in programs:
        assert_fits(program)


def test_products_run_on_tensor_cores(programs):
    for program in programs:
        if program["kernel"] in LISTS:
            continue
        assert_multiplies(program, program["case"].split(":")[1])
        for product in program["products"]:
            assert program["capability"] == 90 or product.startswith("mma.sync."), program


def test_float32_products_split_their_operands(programs):
    """Plain tf32 has 11 bits."""
    for program in programs:
        if ":float32:" in program["case"] and program["kernel"] not in LISTS:
            assert program["precisions"] == ["tf32x3"], program


def test_no_length_compiles_anew(compiles_once):
    compiles_once({"softmax:float16:64:causal:masked": ((1024,), (1023,), (1,))})


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_length_reaches_beyond_the_tensors(kind):
    """Lengths inside tensors are not checked: NaN around the tokens reveals out-of-bounds reads."""
    minimum, maximum = -(2**31), 2**31 - 1
    around = torch.full((3, 60, 2, 16), torch.nan, device=DEVICE)
    tokens = around[:, 20:40]
    tokens.copy_(torch.randn(tokens.shape))
    q, k, v = (t.requires_grad_() for t in tokens.detach())
    for ends in (
        [minimum, maximum, minimum, maximum],
        [-5, 7, 3, 21],
        [maximum, maximum, 7, minimum],
    ):
        cu = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        out = tm.attention(q, k, v, kind=kind, cu_seqlens_q=cu, backend="triton")
        for result in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
            assert torch.isfinite(result).all()
    assert torch.isnan(around[:, :20]).all() and torch.isnan(around[:, 40:]).all()


MASKED = {
    "segments": ({}, "sorted"),
    "segments, causal, shared": ({"causal": True}, "shared"),
    "prefix, window": ({"window": (30, -1)}, "prefix"),
    "ranges": ({}, "ranges"),
}


def mask_of(name, g):
    if name == "prefix":
        return tm.masks.prefix(torch.tensor([20, 0], dtype=torch.int32, device=DEVICE))
    if name == "ranges":
        begin = torch.randint(0, 100, (1, 4, 75, 2), generator=g, dtype=torch.int32).to(DEVICE)
        return tm.masks.ranges(begin, begin + 25)
    ids = [torch.randint(0, 5, (2, n), generator=g, dtype=torch.int32) for n in (75, 100)]
    if name == "sorted":
        ids = [i.sort(-1)[0] for i in ids]
    return tm.masks.segments(*(i.to(DEVICE) for i in ids), shared=2 if name == "shared" else None)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("of_keys", [False, True])
def test_lists_name_the_tiles_that_a_mask_leaves(name, of_keys):
    """Each tile with a visible pair is listed, no tile is listed that the mask bounds exclude, and
    full tiles have no masked pair."""
    from tokenmill.reference.dense import _common
    from tokenmill.triton_kernels.dense.attention import Call, Tiles

    options, kind = MASKED[name]
    q = torch.zeros(2, 75, 4, 16, device=DEVICE)
    k = torch.zeros(2, 100, 2, 16, device=DEVICE)
    mask = mask_of(kind, torch.Generator().manual_seed(0))
    call = Call(*SPEC.record(q, k, k, mask=mask, **options))
    lists = call.lists(Tiles(8, 8, 4, 1), of_keys=of_keys)
    right = 0 if call.causal else call.window_right
    pairs = _common.visible_pairs(75, 100, call.window_left, right, q.device)
    masks = call.mask_ranges, call.mask_q_spans, call.mask_k_spans
    pairs = _common.masked_pairs(pairs, *masks)
    heads = 2 if of_keys else 4
    pairs = pairs.expand(2, 4, -1, -1).unflatten(1, (heads, -1))
    some = torch.nn.functional.pad(pairs.any(2).cpu(), (0, 4, 0, 5))
    every = torch.nn.functional.pad(pairs.all(2).cpu(), (0, 4, 0, 5))
    if of_keys:  # rows of the block beyond the sequence do not count
        every[..., :75, 100:] = True
    else:
        every[..., 75:, :100] = True
    some, every = (x.unflatten(2, (10, 8)).unflatten(4, (13, 8)) for x in (some, every))
    some, every = some.any(3).any(4), every.all(3).all(4)
    if of_keys:
        some, every = some.mT, every.mT
    found = []
    for b, h, block in itertools.product(range(2), range(heads), range(some.shape[2])):
        i_list = b * lists.batch * some.shape[2] + block
        row = lists.data[i_list, h * lists.head].tolist()
        part, whole = row[2 : 2 + row[0]], row[len(row) - row[1] :]
        listed = set(part) | set(whole)
        assert len(listed) == len(part) + len(whole)
        seen, full = (set(x[b, h, block].nonzero()[:, 0].tolist()) for x in (some, every))
        assert seen <= listed and set(whole) <= full
        if name == "segments":  # for sorted ids the bounds are exact
            assert seen == listed and set(whole) == full
        found += [len(part), len(whole)]
    assert any(found[::2]) and (any(found[1::2]) or kind in ("shared", "ranges"))
