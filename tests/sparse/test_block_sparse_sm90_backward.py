"""The sm_90a backward of block_sparse_attention on the PTX machine."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import BF16, NAN, PACKED, PACKED_KEYS, drawn_sm90
from conftest import backends
from sm90 import check_every_order, hopper

import tokenmill as tm
from tokenmill import _emulator
from tokenmill.sparse.block_sparse_attention import SPEC

pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")

KERNELS = ("block_sparse_queries_sm90_kernel", "block_sparse_keys_sm90_kernel")


def emulated(*args, **kwargs):
    return tm.block_sparse_attention(*args, **kwargs, backend="emulated")


def reference(*args, **kwargs):
    return tm.block_sparse_attention(*args, **kwargs, backend="reference")


def plain(*args, **kwargs):
    """PyTorch in the dtype of q."""
    out, lse, _ = SPEC.plain(SPEC.record(*args, **kwargs))
    return out, lse


def gradients(args, kwargs, attend=emulated):
    """Gradients of q, k, v, and of sink if given, for random cotangents of out and of finite
    lse."""
    leaves = [x.detach().requires_grad_() for x in args[:3]]
    if "sink" in kwargs:
        leaves.append(kwargs["sink"].to(leaves[0].dtype).requires_grad_())
        kwargs = kwargs | {"sink": leaves[3]}
    out, lse = attend(*leaves[:3], *args[3:], **kwargs)
    g = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(x.shape, generator=g).to(x) for x in (out, lse)]
    return torch.autograd.grad([out, torch.where(lse.isfinite(), lse, 0)], leaves, cotangents)


def check_budget(args, kwargs, taken=True):
    with hopper(), _emulator.counting() as launches:
        found = gradients(args, kwargs)
    names = "".join(launch["kernel"] for launch in launches)
    assert all((kernel in names) == taken for kernel in KERNELS)
    wide = gradients([*(x.double() for x in args[:3]), *args[3:]], kwargs, reference)
    for i, (actual, oracle, eager) in enumerate(
        zip(found, wide, gradients(args, kwargs, plain), strict=True)
    ):
        tm.testing.assert_accurate(actual, oracle, eager, gradient=True, name=f"gradient {i}")
    return found


CASES = {
    "ragged": {"sq": 130, "sk": 300, "entries": 4},
    "a group, first and last keys": {
        "sq": 100, "sk": 330, "h": 3, "causal": True, "num_sink": 70, "num_recent": 100,
        "entries": 3, "dtype": BF16,
    },
    "blocks of 128 of four heads, wide": {
        "sq": 200, "sk": 260, "h": 4, "d": 128, "block_q": 128, "block_k": 128, "causal": True,
        "num_recent": 40, "entries": 2,
    },
    "lists of query heads, wide": {
        "sq": 70, "sk": 200, "h": 2, "lists": 2, "d": 128, "block_k": 128, "entries": 2,
        "dtype": BF16,
    },
    "lengths, sink": {
        "sq": 40, "sk": 200, "b": 3, "h": 2, "hk": 2, "entries": 3, "sink": True, "causal": True,
        "num_sink": 9, "seqlens_k": torch.tensor([0, 150, 30], dtype=torch.int32),
    },
    "packed": PACKED_KEYS | {"h": 2, "causal": True, "num_recent": 10},
    "packed, padded keys": PACKED | {
        "h": 2, "seqlens_k": torch.tensor([60, 0, 150, 90], dtype=torch.int32),
    },
    "packed, wide, lists of anything": PACKED_KEYS | {
        "d": 128, "hostile": True, "causal": True, "num_recent": 70, "sink": True,
    },
    "packed, blocks of 128 of three heads": PACKED | {
        "h": 3, "block_q": 128, "block_k": 128, "dtype": BF16,
        "seqlens_k": torch.tensor([60, 0, 150, 90], dtype=torch.int32),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_keep_the_budget(name):
    check_budget(*drawn_sm90(**CASES[name]))


@pytest.mark.parametrize("seed", range(2))
def test_hostile_lists(seed):
    """Lists have repeated, unordered or invalid ids, and more rows than a warp reads at once."""
    check_budget(
        *drawn_sm90(seed=seed, sq=130, sk=150, entries=40, hostile=True, num_sink=seed * 40)
    )


def test_the_largest_scale_leaves_scores_of_zero():
    """Exponents of 0 stay 0."""
    args, kwargs = drawn_sm90(sq=32, sk=64, entries=1, scale=2.0**127)
    args[0].zero_()
    args[3][:], args[4][:] = 0, 1
    with hopper():
        _, dk, dv = gradients(args, kwargs)
    _, _, wanted = gradients(args, kwargs, reference)
    assert (dk == 0).all()
    torch.testing.assert_close(dv, wanted, rtol=1e-3, atol=1e-3)


def test_many_blocks_of_queries_list_a_block():
    check_budget(*drawn_sm90(sq=64 * 35, sk=64, entries=1))


@pytest.mark.parametrize("d", [64, 128])
def test_every_order_of_events_gives_the_same_bits(d):
    """There are more tiles than pipeline stages."""
    args, kwargs = drawn_sm90(
        sq=192, sk=192, h=2, d=d, entries=3, causal=True, num_sink=64, num_recent=70
    )
    check_every_order(lambda: gradients(args, kwargs))


def test_a_packed_request_has_the_bits_that_it_has_alone():
    """The bits do not depend on the contents of its neighbors."""
    (q, k, v, indices, counts), kwargs = drawn_sm90(**PACKED_KEYS)
    cu_q, cu_k = kwargs.pop("cu_seqlens_q"), kwargs.pop("cu_seqlens_k")
    q[:70] = k[:60] = v[:60] = q[134:] = k[300:] = v[300:] = NAN
    rows = slice(70 // 64 + 2, 70 // 64 + 3)  # list rows of the third request
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    alone = [q[None, 70:134], k[None, 60:300], v[None, 60:300], indices[:, rows], counts[:, rows]]
    alone[3:] = [x[None] for x in alone[3:]]

    def squares(args, options):
        leaves = [x.detach().requires_grad_() for x in args[:3]]
        out, _ = emulated(*leaves, *args[3:], **kwargs, **options)
        out.backward(out.detach())
        return [x.grad for x in leaves]

    with hopper():
        dq, dk, dv = squares((q, k, v, indices, counts), packed)
        wanted = squares(alone, {})
    for a, b in zip((dq[70:134], dk[60:300], dv[60:300]), wanted, strict=True):
        assert torch.equal(a, b[0])


def test_keys_behind_the_last_one_have_no_gradient_and_leave_none():
    lengths = {"seqlens_k": torch.tensor([100], dtype=torch.int32)}
    args, kwargs = drawn_sm90(sq=64, sk=128, entries=2, **lengths)
    args[3][:], args[4][:] = torch.arange(2), 2
    with hopper():
        clean = gradients(args, kwargs)
        args[1][:, 100:], args[2][:, 100:] = NAN, NAN
        found = gradients(args, kwargs)
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    assert (found[1][:, 100:] == 0).all() and (found[2][:, 100:] == 0).all()


def test_keys_without_a_request_have_no_gradient():
    (q, k, v, *_), kwargs = drawn_sm90(sq=200, sk=200, entries=4)
    inner = torch.tensor([5, 100, 150], dtype=torch.int32)
    lists = torch.zeros(1, 200 // 64 + 2, 4, dtype=torch.int32)
    args = (q[0], k[0], v[0], lists, torch.ones_like(lists[..., 0]))
    with hopper():
        found = gradients(args, kwargs | {"cu_seqlens_q": inner, "cu_seqlens_k": inner})
    for x in found:
        assert (x[:5] == 0).all() and (x[150:] == 0).all() and x[5:50].any()


def test_softcap_falls_to_the_backward_of_every_chip():
    args, kwargs = drawn_sm90(sq=64, sk=64, entries=1, softcap=2.0)
    check_budget(args, kwargs, taken=False)
    leaves = [x.requires_grad_() for x in args[:3]]
    with _emulator.configured("device=sm_90a"):
        kernel, capped = (
            tm.explain(
                "block_sparse_attention", *leaves, *args[3:], backend="emulated", **options
            ).kernel
            for options in (kwargs | {"softcap": 0.0}, kwargs)
        )
    assert "kernel_sm90 and kernel_backward_sm90 in" in kernel
    assert "'s backward (not kernel_backward_sm90: softcap: must be 0 in float32" in capped
