"""Fences before relaxed arrivals and after relaxed waits, and the proxy of other blocks: each case
with a kernel that keeps the rule and one that breaks it."""

from __future__ import annotations

import pytest
from hopper import init, wait
from test_races import (
    ARRIVE,
    CLUSTER,
    CTA,
    FENCE,
    LOAD,
    NONE,
    PROXY,
    REMOTE,
    Case,
    check,
    flag,
)

CASES = {
    "a fence before a relaxed arrival": Case(
        ARRIVE,
        "fence.acq_rel.cta; mbarrier.arrive.relaxed.cta.shared.b64 _, [bar];",
        "mbarrier.arrive.relaxed.cta.shared.b64 _, [bar];",
        rf"race: read of .*written by warp 0 at line.*{NONE}",
    ),
    "a fence before a relaxed arrival at barrier.cluster": Case(
        CLUSTER.replace("barrier", "HERE barrier", 1).replace("arrive.HERE", "arrive.relaxed"),
        "fence.acq_rel.cluster;",
        "fence.acq_rel.cta;",
        r"race: read of shared address 0x0 of block \d.*no barrier\.cluster",
        grid=2,
        cluster=2,
    ),
    "a fence before a relaxed remote arrival": Case(
        REMOTE.replace("HERE", "relaxed.cluster.").replace(
            "@%p0 mbarrier.arrive", "HERE @%p0 mbarrier.arrive"
        ),
        "fence.acq_rel.cluster;",
        "fence.acq_rel.cta;",
        r"race: read of .*written by warp 0 of block",
        grid=2,
        cluster=2,
    ),
    "a fence behind a relaxed wait for a remote arrival": Case(
        REMOTE.replace("HERE", "")
        .replace("try_wait.parity.", "try_wait.parity.relaxed.cluster.")
        .replace("ld.shared.u32 %r5", "HERE\nld.shared.u32 %r5"),
        "fence.acq_rel.cluster;",
        "fence.acq_rel.cta;",
        r"race: read of .*written by warp 0 of block",
        grid=2,
        cluster=2,
    ),
    "flag: scope of the second fence": Case(
        flag(
            "st.relaxed.gpu.global.u32",
            "ld.relaxed.gpu.global.u32",
            "fence.acq_rel.gpu;",
            "fence.acq_rel.HERE;",
        ),
        "gpu",
        "cta",
        rf"race: read of global .*{CTA.format('gpu')}",
        grid=2,
    ),
    "a bulk copy of what another block wrote": Case(
        init(1)
        + flag("st.release.gpu.global.u32", "ld.acquire.gpu.global.u32").rpartition("ld.global")[0]
        + f"@!%p0 ret;\nHERE\nmbarrier.arrive.expect_tx.shared.b64 _, [bar], 128;\n"
        f"{LOAD} [%r2], [%d0+256], 128, [bar];\n" + wait("0"),
        "fence.proxy.async;",
        "",
        rf"race: read of global .*written by warp 0 of block \(0, 0, 0\) at line.*{PROXY}",
        grid=2,
    ),
    "a bulk copy: the fence before the acquire": Case(
        init(1)
        + flag("st.release.gpu.global.u32", "ld.relaxed.gpu.global.u32").rpartition("ld.global")[0]
        + f"@!%p0 ret;\nHERE\nmbarrier.arrive.expect_tx.shared.b64 _, [bar], 128;\n"
        f"{LOAD} [%r2], [%d0+256], 128, [bar];\n" + wait("0"),
        "fence.acq_rel.gpu; fence.proxy.async;",
        "fence.proxy.async; fence.acq_rel.gpu;",
        rf"race: read of global .*written by warp 0 of block \(0, 0, 0\) at line.*{PROXY}",
        grid=2,
    ),
    "many readers and a writer": Case(
        f"@%p0 st.shared.u32 [%r2], 1;\n{FENCE}bar.sync 0;\nld.shared.u32 %r5, [%r2];\nHERE\n"
        "@%p2 st.shared.u32 [%r2], 2;\n",
        "bar.sync 0;",
        "",
        rf"race: (write to|read of) shared .*{NONE}",
        block=512,
    ),
}


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("name", CASES)
def test_race(name: str, order: str) -> None:
    check(CASES[name], order, modes=("latest",))
