"""Programs that are right, or harmless, and that a check could take for wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hopper import init, kernel, sm90, wait
from machine import MachineError, machine

COPY = "cp.async.ca.shared.global"


@pytest.mark.parametrize("seed", range(20))
def test_two_groups_of_copies_on_two_mbarriers(seed: int) -> None:
    """An arrival may overtake that of earlier copies, which it tracks too."""
    body = (
        init(32)
        + "@%p0 mbarrier.init.shared::cta.b64 [bar+8], 32;\nbar.sync 0;\n"
        + "mad.lo.u32 %r4, %r0, 16, %r2;\n@!%p1 bra READ;\n"
        + f"{COPY} [%r4], [%d0], 16;\ncp.async.mbarrier.arrive.noinc.shared.b64 [bar];\n"
        + f"{COPY} [%r4+512], [%d0], 16;\ncp.async.mbarrier.arrive.noinc.shared.b64 [bar+8];\n"
        + "READ: @%p2 sub.u32 %r4, %r4, 512;\n"
        + wait("0")
        + "ld.shared.u32 %r5, [%r4];\n"
        + wait("0", "bar+8")
        + "ld.shared.u32 %r5, [%r4+512];\n"
    )
    with sm90(check=1, order="seeded", seed=seed, **{"async": f"seed:{seed}"}):
        machine.run(kernel(body, shared=1024), "k", np.ones(64, np.uint32), block=64)


@pytest.mark.parametrize("order", ["forward", "reverse", "seeded", "weak"])
def test_warps_that_store_the_same(order: str) -> None:
    """A note, and a race if the values differ, or if nothing orders a reader behind all of them."""
    same = "st.shared.u32 [%r2], 7;\n"
    reader = "bar.sync 0;\nld.shared.u32 %r5, [%r2];\n"
    with sm90(check=1, order=order, seed=1):
        machine.run(kernel(same + reader), "k", np.ones(64, np.uint32), block=64)
        for wrong in ("st.shared.u32 [%r2], %r3;\n" + reader, same + "ld.shared.u32 %r5, [%r2];\n"):
            with pytest.raises(MachineError, match="race: "):
                machine.run(kernel(wrong), "k", np.ones(64, np.uint32), block=64)
    with sm90(check=1, order=order, seed=1), machine.reporting() as reports:
        machine.run(kernel(same + reader), "k", np.ones(64, np.uint32), block=64)
    assert {report.rule for report in reports} == {"note: equal values"}


def test_lanes_that_store_the_same() -> None:
    body = "st.shared.u32 [%r2], 7;\nld.shared.u32 %r5, [%r2];\n"
    with sm90(check=1), machine.reporting() as reports:
        machine.run(kernel(body), "k", np.ones(64, np.uint32), block=32)
    assert not reports
