"""The largest group of the tests: 8 ranks behave as 2 to 4 ranks do, with shards of four tokens and
of none. It is one test, because eight processes are started for it."""

from __future__ import annotations

import contextlib

import test_distributed_attention as of_attention
import test_distributed_decode as of_decode
import test_distributed_linear as of_linear
import torch
from ranks import Ranks
from test_distributed_plan import count_on_a_rank


def test_eight_ranks():
    with contextlib.closing(Ranks(8)) as group:
        names = ("causal", "sigmoid", "relu", "causal window")
        args = ((37, 3), names, of_attention.SCHEDULES, ("contiguous", "zigzag"), torch.float32)
        for wrong in group.run(of_attention.on_a_rank, *args, (8, 4)):
            assert not wrong
        names = ("constant", "gates from a state", "forgets at once")
        cases = of_linear.cases(names, of_linear.WHOLES[2:], ("equal", "ragged"))
        of_linear.check(lambda size: group, 8, cases)
        sizes = (8, 0, 16, 4, 8, 0, 4, 24)
        for paged in (False, True):
            args = (8, sizes, 3, tuple(of_decode.OPTIONS), torch.float32, paged)
            for wrong in group.run(of_decode.decode_on_a_rank, *args):
                assert not wrong
        assert set(group.run(of_decode.topk_on_a_rank, (1, 2, 3, 0, 0, 9, 60, 1))) == {96}
        group.run(count_on_a_rank, 8)
