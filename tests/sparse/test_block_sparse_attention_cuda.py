"""block_sparse_attention on the PTX machine: bytes read and products, windows of query blocks,
parts of transposed lists, any order of CTAs."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import check_rows_read

import tokenmill as tm
from tokenmill import _emulator, registry
from tokenmill.registry import Sample
from tokenmill.sparse.block_sparse_attention_cases import block_sparse_call, draw_lists
from tokenmill.testing import compare

pytestmark = pytest.mark.skipif(
    not tm._call.library.emulated_built(),
    reason="only a development build has the PTX machine (TOKENMILL_PTXVM=1)",
)
SPEC = registry.get("block_sparse_attention")


def drawn(dtype=torch.float16, seed=0, **options):
    return block_sparse_call(**options)(dtype, torch.Generator().manual_seed(seed))


def run(args, kwargs):
    return tm.block_sparse_attention(*args, **kwargs, backend="emulated")


def gradients(args, kwargs):
    q, k, v = (t.detach().requires_grad_() for t in args[:3])
    out, lse = run((q, k, v, *args[3:]), kwargs)
    lse = torch.where(torch.isfinite(lse), lse, 0.0)
    return torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v))


@pytest.mark.parametrize(
    "block_q, heads, kv_heads, lists",
    [(64, 2, 2, 2), (16, 8, 2, 2), (32, 4, 1, 1), (128, 2, 1, 2)],
    ids=["a head", "small blocks of a group", "a group", "a list of each head"],
)
@pytest.mark.parametrize("block_k", [64, 16, 2])
def test_forward_reads_listed_keys_once_and_multiplies_what_it_reads(
    block_q, heads, kv_heads, lists, block_k
):
    dim, length, size = 64, 256, 2
    args, kwargs = drawn(
        sq=length, sk=length, b=1, h=heads, hk=kv_heads, d=dim, dv=dim, lists=lists,
        entries=128 // block_k, block_q=block_q, block_k=block_k,
    )  # fmt: skip
    with _emulator.counting() as launches:
        run(args, kwargs)
    (launch,) = launches
    together = heads // max(lists, kv_heads)
    keys = args[4] * block_k  # keys per block of queries
    check_rows_read(launch, 2 * dim * size * int(keys.sum()), args[0].numel() * size)
    covered = int((-(-keys // 16) * 16).sum()) * block_q * together
    assert launch["mma"] == 4 * dim * covered / 4096
    assert launch["classes"]["special"]["lanes"] <= 1.2 * covered
    waves, ideal = (sum(r[k] for r in launch["shared"].values()) for k in ("waves", "ideal"))
    warps = args[0].numel() // dim // 16
    assert waves <= ideal + 8 * warps  # a warp reads its row sums once
    assert launch["local_requests"] == 0


def test_backward_multiplies_covered_tiles():
    dim, length, block = 64, 256, 64
    args, kwargs = drawn(
        sq=length, sk=length, b=1, h=2, hk=1, d=dim, dv=dim, lists=1, entries=3, block_q=block,
        block_k=block,
    )  # fmt: skip
    with _emulator.counting() as launches:
        gradients(args, kwargs)
    queries, keys = (
        next(x for x in launches if f"block_sparse_{side}_kernel" in x["kernel"])
        for side in ("queries", "keys")
    )
    pairs = 2 * block * block * int(args[4].sum())
    assert queries["mma"] == 6 * dim * pairs / 4096
    assert keys["mma"] == 8 * dim * pairs / 4096
    for launch in (queries, keys):
        assert launch["classes"]["special"]["lanes"] <= 1.2 * pairs
        waves, ideal = (sum(r[k] for r in launch["shared"].values()) for k in ("waves", "ideal"))
        assert waves <= 1.02 * ideal and launch["local_requests"] == 0


@pytest.mark.parametrize("lists, group, packed", [(1, 1, False), (1, 2, True), (2, 2, False)])
def test_windows_of_blocks_of_queries(lists, group, packed):
    """More query blocks than a CTA holds at once."""
    options = {"sq": 1100, "sk": 40, "b": 1, "h": group, "hk": 1, "d": 16, "dv": 16}
    if packed:
        options |= {"b": 2, "sq": 350, "ends_q": (30, 700), "ends_k": (25, 65)}
    sample = Sample(
        "windows",
        block_sparse_call(**options, lists=lists, block_q=1, block_k=4, entries=3, num_sink=1),
    )
    found = compare(SPEC, sample, "emulated", torch.float32, device="cpu")
    assert not [c for c in found if not c.ok]


@pytest.mark.parametrize("dv", [20, 18])
def test_sums_of_float32_have_a_second_level(dv):
    """The lists have more than 1024 keys."""
    sample = Sample(
        "long lists",
        block_sparse_call(
            sq=20, sk=2600, b=1, h=1, hk=1, lists=1, d=16, dv=dv, block_k=16, entries=163
        ),
    )
    found = compare(SPEC, sample, "emulated", torch.float32, device="cpu")
    assert not [c for c in found if not c.ok]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_wide_tiles_without_keys(dtype):
    """Sums of the warps overwrite the queries immediately."""
    args, kwargs = drawn(dtype, sq=128, sk=30, b=1, h=1, hk=1, lists=1, d=128, dv=128, block_q=128)
    args[4].zero_()
    out, lse = run(args, kwargs)
    assert (out == 0).all() and (lse == -float("inf")).all()


@pytest.mark.parametrize("rows, entries, blocks", [(500, 40, 60), (200, 64, 64), (70, 9, 2000)])
def test_parts_of_the_rows_of_transposed_lists(rows, entries, blocks):
    lists = draw_lists(1, 2, rows, entries, blocks, torch.Generator().manual_seed(1))
    got, want = (
        tm.transpose_block_list(*lists, blocks, backend=backend)
        for backend in ("emulated", "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("order, packed", [("reverse", True), ("seeded", False)])
def test_no_order_of_blocks_changes_a_bit(order, packed):
    ends = {"ends_q": (70, 130), "ends_k": (150, 180)} if packed else {}
    args, kwargs = drawn(
        sq=80, sk=150, h=4, hk=2, block_k=4, entries=20, causal=True, num_sink=3, num_recent=20,
        **ends,
    )  # fmt: skip
    want = (*run(args, kwargs), *gradients(args, kwargs))
    with _emulator.configured(f"order={order},seed=3"):
        got = (*run(args, kwargs), *gradients(args, kwargs))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [65, 200])
def test_wide_heads_of_packed_requests_fit_a_device_with_little_shared_memory(dim, dtype):
    options = {
        "sq": 20, "sk": 32, "b": 2, "h": 2, "hk": 1, "d": dim, "dv": dim, "lists": 1, "entries": 2,
        "page": 8, "ends_q": (3, 21), "seqlens_k": torch.tensor([5, 32], dtype=torch.int32),
        "return_mass": True, "causal": True,
    }  # fmt: skip
    args, kwargs = drawn(dtype, **options)
    with _emulator.configured("device=sm_86"):
        got = run(args, kwargs)
    want = tm.block_sparse_attention(*args, **kwargs, backend="reference")
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
