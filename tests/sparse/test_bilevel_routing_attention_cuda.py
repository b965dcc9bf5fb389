"""bilevel_routing_attention on the PTX machine: bytes read and products, maps of any strides and
region sizes, lists in any order, any order of CTAs."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import check_rows_read
from torch.nn.functional import pad

import tokenmill as tm
from tokenmill import _emulator, registry
from tokenmill.registry import Sample
from tokenmill.sparse.bilevel_routing_attention_cases import bilevel_call
from tokenmill.testing import compare

pytestmark = pytest.mark.skipif(
    not tm._call.library.emulated_built(),
    reason="only a development build has the PTX machine (TOKENMILL_PTXVM=1)",
)
SPEC = registry.get("bilevel_routing_attention")


def drawn(dtype=torch.float16, seed=0, **options):
    return bilevel_call(**options)(dtype, torch.Generator().manual_seed(seed))


def run(args, kwargs):
    return tm.bilevel_routing_attention(*args, **kwargs, backend="emulated")


def gradients(args, kwargs):
    q, k, v = (t.detach().requires_grad_() for t in args)
    out, lse = run((q, k, v), kwargs)
    lse = torch.where(torch.isfinite(lse), lse, 0.0)
    return torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v))


def check_against_reference(make, dtype=torch.float32):
    found = compare(SPEC, Sample("a call", make), "emulated", dtype, device="cpu")
    assert not [c for c in found if not c.ok]


def round_up(n, step):
    return -(-n // step) * step


def pixels_of_regions(size, region):
    rows, columns = (
        [min(r, n - at) for at in range(0, n, r)] for n, r in zip(size, region, strict=True)
    )
    return torch.tensor([[y * x for x in columns] for y in rows]).flatten()


def listed_pixels(kwargs, size):
    """Pixels of the listed key regions, [B, heads, R, K]."""
    return pixels_of_regions(size, kwargs["region_size"])[kwargs["region_graph"]]


@pytest.mark.parametrize(
    "size, region, heads, kv_heads, graphs, max_rows",
    [
        ((16, 24), (8, 8), 2, 2, 1, 128),
        ((16, 16), (8, 8), 4, 1, 1, 128),
        ((16, 16), (8, 8), 2, 1, 2, 128),
        ((24, 24), (12, 12), 1, 1, 1, 128),  # 144 pixels: two tiles of five warps
        ((14, 20), (8, 8), 2, 2, 2, 128),  # regions that do not divide
        ((8, 16), (4, 4), 4, 1, 1, 128),  # 16 pixels
    ],
    ids=["64 pixels", "a group", "a list of each head", "tiles", "smaller regions", "small"],
)
def test_forward_reads_listed_keys_once_for_each_tile_and_multiplies_what_it_reads(
    size, region, heads, kv_heads, graphs, max_rows
):
    dim, bytes_of = 64, 2
    args, kwargs = drawn(
        size=size, region_size=region, b=1, h=heads, hk=kv_heads, d=dim, dv=dim, graphs=graphs,
        topk=3,
    )  # fmt: skip
    with _emulator.counting() as launches:
        run(args, kwargs)
    (launch,) = launches
    together = heads // max(graphs, kv_heads)
    whole = region[0] * region[1] * together
    tiles = -(-whole // max_rows)
    tile_rows = round_up(-(-whole // tiles), 16)
    own = pixels_of_regions(size, region) * together
    slots = listed_pixels(kwargs, size).expand(-1, heads // together, -1, -1)
    read = slots.sum(-1) * -(-own // tile_rows)
    check_rows_read(launch, bytes_of * dim * 2 * int(read.sum()), args[0].numel() * bytes_of)
    # Steps of 16 keys from the start of the list; keys beyond smaller regions are skipped.
    slot = region[0] * region[1]
    slots = slots.gather(-1, kwargs["region_graph"].argsort(-1).expand_as(slots))
    seen = torch.arange(slot) < slots[..., None]
    steps = (
        pad(seen.flatten(-2), (0, -seen[0, 0, 0].numel() % 16))
        .unflatten(-1, (-1, 16))
        .any(-1)
        .sum(-1)
    )
    covered = 16 * int((steps * ((own + 15) // 16 * 16)).sum())
    assert launch["mma"] == 4 * dim * covered / 4096
    assert launch["classes"]["special"]["lanes"] <= 1.2 * covered
    waves, ideal = (sum(r[k] for r in launch["shared"].values()) for k in ("waves", "ideal"))
    warps = int((steps > 0).expand_as(slots[..., 0]).mul((own + 15) // 16).sum())
    assert waves <= ideal + 8 * warps  # a warp reads its row sums once
    assert launch["local_requests"] == 0


def test_backward_multiplies_listed_regions():
    dim, size, region = 64, (16, 24), (8, 8)
    args, kwargs = drawn(size=size, region_size=region, b=1, h=2, hk=1, d=dim, dv=dim, topk=3)
    with _emulator.counting() as launches:
        gradients(args, kwargs)
    queries, keys = (
        next(x for x in launches if f"bilevel_{side}_kernel" in x["kernel"])
        for side in ("queries", "keys")
    )
    pairs = 2 * 64 * int(listed_pixels(kwargs, size).sum())
    assert queries["mma"] == 6 * dim * pairs / 4096
    assert keys["mma"] == 8 * dim * pairs / 4096
    listed = 2 * dim * 2 * 64 * kwargs["region_graph"].numel()
    tiles = 1  # query tiles: 2 heads of 64 pixels in 8 warps
    owned = 2 * 2 * args[0].numel()
    check_rows_read(queries, tiles * listed + owned)
    for launch in (queries, keys):
        assert launch["classes"]["special"]["lanes"] <= 1.2 * pairs
        waves, ideal = (sum(r[k] for r in launch["shared"].values()) for k in ("waves", "ideal"))
        assert waves <= 1.02 * ideal and launch["local_requests"] == 0


STRIDES = {
    "part of a map": lambda t: pad(t, (0, 0, 0, 0, 1, 2, 3, 1))[:, 3:-1, 1:-2],
    "columns first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "heads first": lambda t: t.permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4),
    "every other line": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "backwards in a batch": lambda t: t.repeat_interleave(3, 0)[::3],
}


@pytest.mark.parametrize("strides", list(STRIDES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strides_of_maps(dtype, strides):
    (q, k, v), kwargs = drawn(dtype, size=(9, 11), regions=(2, 3), topk=4, d=24, dv=18)
    dout = torch.randn(*q.shape[:4], 18, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for change in (torch.Tensor.contiguous, STRIDES[strides]):
        args = [change(t).detach().requires_grad_() for t in (q, k, v)]
        out, _ = run(args, kwargs)
        results.append((out, *torch.autograd.grad(out, args, change(dout))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("graphs", [1, 2, 4])
@pytest.mark.parametrize("region", [(2, 2), (4, 4), (3, 5), (40, 7)], ids=str)
@pytest.mark.parametrize("mask_padding", [True, False], ids=["masked", "padded"])
def test_regions_of_any_size(region, graphs, mask_padding):
    """Regions with fewer pixels than a warp has rows, or more lines than the map."""
    rows, columns = (-(-n // r) for n, r in zip((11, 13), region, strict=True))
    topk = min(5, rows * columns)
    check_against_reference(
        bilevel_call(
            (11, 13), region_size=region, topk=topk, graphs=graphs, b=1, mask_padding=mask_padding
        )
    )


@pytest.mark.parametrize("mask_padding", [True, False], ids=["masked", "padded"])
@pytest.mark.parametrize("wild", [False, True])
def test_lists_of_more_entries_than_a_warp_has_lanes(wild, mask_padding):
    """Lists hold each region once, or have no order, repetitions and invalid ids."""
    check_against_reference(
        bilevel_call(
            (14, 17), region_size=(2, 2), b=1, topk=60, wild=wild, mask_padding=mask_padding
        )
    )


def test_queries_that_many_regions_share():
    """Every region lists one key region, separately per head; unlisted regions have no gradient."""
    args, kwargs = drawn(torch.float32, size=(12, 12), region_size=(2, 2), b=1, h=4, hk=2, graphs=4)
    kwargs["region_graph"][:] = torch.tensor([0, 7, 35], dtype=torch.int32)
    check_against_reference(lambda *_: (args, kwargs))
    _, dk, dv = gradients(args, kwargs)
    for t in (dk, dv):
        seen = t.abs().sum((0, 3, 4)) > 0
        listed = torch.zeros(12, 12, dtype=torch.bool)
        for region in (0, 7, 35):
            y, x = region // 6 * 2, region % 6 * 2
            listed[y : y + 2, x : x + 2] = True
        assert torch.equal(seen, listed)


@pytest.mark.parametrize("dv", [20, 18])
def test_sums_of_float32_have_a_second_level(dv):
    """The lists have more than 1024 keys."""
    check_against_reference(
        bilevel_call((48, 50), b=1, h=1, hk=1, regions=(3, 2), topk=4, d=16, dv=dv)
    )


@pytest.mark.parametrize("order", ["reverse", "seeded"])
def test_no_order_of_blocks_changes_a_bit(order):
    args, kwargs = drawn(size=(13, 17), regions=(4, 3), topk=5, mask_padding=False)
    want = (*run(args, kwargs), *gradients(args, kwargs))
    with _emulator.configured(f"order={order},seed=3"):
        got = (*run(args, kwargs), *gradients(args, kwargs))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
