"""sparse_decode_attention on the PTX machine: bytes that its kernels read, in any order of CTAs."""

from __future__ import annotations

import pytest
import torch

import tokenmill as tm
from tokenmill import _emulator, registry
from tokenmill.registry import Sample
from tokenmill.sparse.sparse_decode_attention_cases import sparse_call
from tokenmill.testing import compare

pytestmark = pytest.mark.skipif(
    not tm._call.library.emulated_built(),
    reason="only a development build has the PTX machine (TOKENMILL_PTXVM=1)",
)
SPEC = registry.get("sparse_decode_attention")
SECTOR_BYTES = 32


def drawn(dtype=torch.float16, seed=0, **options):
    return sparse_call(**options)(dtype, torch.Generator().manual_seed(seed))


def run(args, kwargs):
    return tm.sparse_decode_attention(*args, **kwargs, backend="emulated")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("lists", [1, 8], ids=["shared list", "list of each head"])
@pytest.mark.parametrize("block_k, pairs", [(1, 0), (16, 0), (16, 64)])
def test_keys_are_read_once_for_the_rows_of_a_head(block_k, pairs, lists, dtype):
    length, listed, batch, heads, kv_heads, dim = 1024, 512, 1, 8, 2, 128
    args, kwargs = drawn(
        dtype, lengths=(length,), h=heads, hk=kv_heads, d=dim, dv=dim, lists=lists,
        entries=listed // block_k, block_k=block_k, capacity=length, num_recent=32, pairs=pairs,
        return_mass=False, num_splits=3,
    )  # fmt: skip
    with _emulator.counting() as launches:
        run(args, kwargs)
    (launch,) = launches
    row_heads, size = max(lists, kv_heads), dtype.itemsize
    # An upper bound: lists may be shorter, and hold some of the last keys.
    keys = row_heads * (listed + 32)
    maximum = keys * (2 * dim * size + 2 * pairs * 4)
    read = sum(launch["global"][kind]["sectors"] for kind in ("load", "copy")) * SECTOR_BYTES
    lists_and_queries = row_heads * listed * 4 + batch * heads * dim * size
    assert 0.9 * maximum <= read <= 1.1 * maximum + 16 * lists_and_queries
    copied = launch["global"]["copy"]["sectors"] * SECTOR_BYTES
    assert copied <= 2 * dim * size * keys + 4 * batch * heads * dim * size
    waves, ideal = (sum(r[k] for r in launch["shared"].values()) for k in ("waves", "ideal"))
    assert waves <= 1.02 * ideal and launch["local_requests"] == 0


@pytest.mark.parametrize("order", ["unsorted", "falling", "equal"])
@pytest.mark.parametrize("entries", [1, 14, 15, 16, 17, 300])
def test_a_block_finds_in_any_list_what_one_thread_does(entries, order):
    """Lists that do not ascend end at their first large entry."""

    def make(dtype, g):
        args, kwargs = drawn(
            dtype, lengths=(400, 230, 33), lists=2, entries=entries, capacity=400, num_sink=40,
            num_recent=100,
        )  # fmt: skip
        indices, counts = args[3:]
        shape = indices.shape
        if order == "unsorted":
            indices[:] = torch.randint(-3, 420, shape, generator=g).int()
        elif order == "falling":
            indices[:] = torch.arange(380, 380 - entries, -1).int()
        else:
            indices[:] = torch.randint(0, 400, (*shape[:2], 1), generator=g).int()
        counts[:] = torch.tensor([entries, max(entries - 1, 0)])
        return args, kwargs

    found = compare(SPEC, Sample(order, make), "emulated", torch.float32, device="cpu")
    assert not [c for c in found if not c.ok]


@pytest.mark.parametrize("order", ["reverse", "seeded"])
def test_no_order_of_blocks_changes_a_bit(order):
    args, kwargs = drawn(
        lengths=(700, 90), h=8, hk=2, capacity=700, entries=500, num_splits=7, num_sink=8, pairs=16
    )
    want = run(args, kwargs)
    with _emulator.configured(f"order={order},seed=3"):
        got = run(args, kwargs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_request_fills_the_device():
    """Blocks of 32 keys, which begin within a tile of 64."""
    args, kwargs = drawn(
        torch.float16, lengths=(512,), h=8, hk=8, d=128, dv=128, lists=8, entries=500, capacity=512,
        return_mass=False,
    )  # fmt: skip
    with _emulator.counting() as launches:
        out = run(args, kwargs)
    (launch,) = launches
    assert launch["grid"][0] == 8 * 16
    want = run(args, kwargs | {"num_splits": 1})
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
