"""Bytes that ranks send, counted and compared with the plan, and the prediction made from them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import tokenmill.distributed as tmd
from tokenmill.distributed import _group
from tokenmill.distributed.plan import decode_bytes

SIZES = {"batch": 2, "length": 32, "heads": 8, "kv_heads": 4, "head_dim": 16, "value_dim": 24}


def count(patch):
    """Counts the bytes that this rank sends to others from now on."""
    sent = [0]
    exchange, gather = _group.funcol.all_to_all_single, _group._all_gather

    def counted_exchange(x, received, parts, group):
        away = sum(n for r, n in enumerate(parts) if r != dist.get_rank())
        sent[0] += away * x.element_size()
        return exchange(x, received, parts, group)

    def counted_gather(x, dim, group):
        sent[0] += x.nbytes * (dist.get_world_size() - 1)
        return gather(x, dim, group)

    patch.setattr(_group.funcol, "all_to_all_single", counted_exchange)
    patch.setattr(_group, "_all_gather", counted_gather)
    return sent


def count_on_a_rank(size):
    costs = tmd.plan(**SIZES, ranks=size, itemsize=4)
    lead = (SIZES["batch"], SIZES["length"] // size)
    q, k = (torch.randn(*lead, SIZES[n], 16, requires_grad=True) for n in ("heads", "kv_heads"))
    v = torch.randn(*lead, SIZES["kv_heads"], 24, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        sent = count(patch)
        for schedule, cost in costs.items():
            for kind in ("softmax", "sigmoid"):
                sent[0] = 0
                out = tmd.attention(q, k, v, schedule=schedule, kind=kind)
                assert sent[0] == cost.forward_bytes, (schedule, sent[0], cost)
                sent[0] = 0
                out.sum().backward()
                assert sent[0] == cost.backward_bytes, (schedule, sent[0], cost)
        sent[0] = 0
        lengths = torch.full((2,), SIZES["length"], dtype=torch.int32)
        with torch.no_grad():
            tmd.attention_decode(q[:, :1], k, v, seqlens_k=lengths)
        assert sent[0] == decode_bytes(2, 1, 8, 24, size)


@pytest.mark.parametrize("size", [2, 4])
def test_a_plan_counts_what_is_sent(ranks, size):
    ranks(size).run(count_on_a_rank, size)


def test_one_rank_sends_nothing():
    for cost in tmd.plan(**SIZES, ranks=1).values():
        assert cost.forward_bytes == cost.backward_bytes == 0


def test_a_prediction_of_one_rank_is_its_own_speed(capsys):
    from tokenmill.__main__ import main

    assert main(["bench", "scale", "--tflops", "400", "--link", "nvlink"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION, not a measurement: 400 TFLOP/s")
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == 16
    for row in rows:
        assert row[1] == "100%"
        assert all(0 <= int(cell[:-1]) <= 100 for cell in row[1:] if cell.endswith("%"))
