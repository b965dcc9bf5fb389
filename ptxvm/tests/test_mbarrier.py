"""mbarrier: phases and counts against a model, waits, cp.async.mbarrier.arrive, reports."""

from __future__ import annotations

import numpy as np
import pytest
from hopper import MODES, init, kernel, sm90, wait
from machine import MachineError, machine


class Model:
    """Model of an mbarrier: the state after every operation, and the result of a wait."""

    def __init__(self, count: int) -> None:
        self.expected = self.pending = count
        self.bytes = self.phase = 0

    def act(self, *, arrive: int = 0, expect: int = 0, complete: int = 0, drop: int = 0) -> None:
        self.bytes += expect - complete
        self.expected -= drop
        self.pending -= arrive + drop
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.expected


def operation(random: np.random.Generator, model: Model) -> str:
    """Text of a random operation that the model allows, after applying it to the model."""
    spare = model.pending - 1 if model.bytes == 0 else model.pending
    choices = ["arrive", "expect", "arrive_expect"]
    if model.pending > 1:
        choices += ["arrive_n", "no_complete"]
    if model.expected > 2:
        choices.append("drop")
    if model.bytes:
        choices += ["complete"] * 3
    if model.pending == 0:
        choices = ["complete"]
    count = int(random.integers(1, max(spare, 1) + 1))
    bytes_ = int(random.integers(1, 1000))
    match random.choice(choices):
        case "arrive":
            model.act(arrive=1)
            return "mbarrier.arrive.shared::cta.b64 %d9, [bar];"
        case "expect":
            model.act(expect=bytes_)
            return f"mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], {bytes_};"
        case "arrive_expect":
            model.act(arrive=1, expect=bytes_)
            return f"mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [bar], {bytes_};"
        case "arrive_n":
            model.act(arrive=count)
            return f"mbarrier.arrive.release.cta.shared.b64 %d9, [bar], {count};"
        case "no_complete":
            count = min(count, model.pending - 1)
            model.act(arrive=count)
            return f"mbarrier.arrive.noComplete.shared.b64 %d9, [bar], {count};"
        case "drop":
            model.act(drop=1)
            return "mbarrier.arrive_drop.shared.b64 %d9, [bar];"
        case _:
            bytes_ = model.bytes if random.integers(2) else int(random.integers(1, model.bytes + 1))
            model.act(complete=bytes_)
            return f"mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], {bytes_};"


def test_counts_and_phases() -> None:
    """After each of many operations: both parities by test_wait, and the pending count."""
    random = np.random.default_rng(0)
    model = Model(4)
    body, wanted = "mbarrier.init.shared.b64 [bar], 4;\n", []
    for step in range(120):
        body += f"{operation(random, model)}\n"
        for parity in (0, 1):
            body += f"""mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 %p3, [bar], {parity};
selp.u32 %r5, 1, 0, %p3; st.global.u32 [%d0+{8 * step + 4 * parity}], %r5;
"""
            wanted.append(model.phase != parity)
        if step % 10 == 9:
            model = Model(4)
            body += "mbarrier.inval.shared.b64 [bar];\nmbarrier.init.shared.b64 [bar], 4;\n"
    out = np.zeros(240, np.uint32)
    with sm90(check=1):
        machine.run(kernel("@!%p0 bra DONE;\n" + body + "DONE:"), "k", out)
    assert out.tolist() == wanted


def test_state_of_a_phase() -> None:
    """A state token names its phase; its pending count is the count before the arrival."""
    body = """@!%p0 bra DONE;
mbarrier.init.shared.b64 [bar], 3;
mbarrier.arrive.shared.b64 %d1, [bar], 2;
mbarrier.pending_count.b64 %r5, %d1;
mbarrier.test_wait.shared.b64 %p3, [bar], %d1;
mbarrier.arrive.shared.b64 %d2, [bar];
mbarrier.try_wait.shared.b64 %p4, [bar], %d1, 100;
mbarrier.pending_count.b64 %r6, %d2;
selp.u32 %r7, 1, 0, %p3; selp.u32 %r8, 1, 0, %p4;
st.global.v4.u32 [%d0], {%r5, %r6, %r7, %r8};
DONE:"""
    out = np.zeros(4, np.uint32)
    with sm90():
        machine.run(kernel(body), "k", out)
    assert out.tolist() == [3, 1, 0, 1]


def test_no_complete_arrival_before_the_bytes() -> None:
    """Pending transaction bytes keep the phase open."""
    body = """@!%p0 bra DONE;
mbarrier.init.shared.b64 [bar], 2;
mbarrier.expect_tx.shared.b64 [bar], 16;
mbarrier.arrive.noComplete.shared.b64 %d1, [bar], 2;
mbarrier.test_wait.parity.shared.b64 %p3, [bar], 0;
mbarrier.complete_tx.shared.b64 [bar], 16;
mbarrier.test_wait.parity.shared.b64 %p4, [bar], 0;
selp.u32 %r7, 1, 0, %p3; selp.u32 %r8, 1, 0, %p4;
st.global.v2.u32 [%d0], {%r7, %r8};
DONE:"""
    out = np.zeros(2, np.uint32)
    with sm90():
        machine.run(kernel(body), "k", out)
    assert out.tolist() == [0, 1]


def test_one_look_may_be_in_vain_at_a_random_moment() -> None:
    """A try_wait without a loop, before the arrival of another warp."""
    body = f"""{init(32)}
@!%p2 bra LOOK;
mbarrier.arrive.shared.b64 _, [bar];
bra DONE;
LOOK: mbarrier.try_wait.parity.shared.b64 %p3, [bar], 0;
selp.u32 %r7, 1, 2, %p3;
@%p0 st.global.u32 [%d0], %r7;
DONE:"""
    seen = {}
    for moment in ("latest", "earliest", *(f"seed:{i}" for i in range(16))):
        out = np.zeros(1, np.uint32)
        with sm90(**{"async": moment, "order": "reverse"}):
            machine.run(kernel(body), "k", out, block=64)
        seen.setdefault(moment.partition(":")[0], set()).add(int(out[0]))
    assert seen == {"latest": {1}, "earliest": {1}, "seed": {1, 2}}


@pytest.mark.parametrize("form", ["try_wait", "test_wait"])
@pytest.mark.parametrize("order", ["forward", "reverse", "seeded"])
def test_producer_and_consumer(order: str, form: str) -> None:
    """A two-stage ring between warps; the counters of try_wait do not depend on the order."""
    body = f"""
@%p0 mbarrier.init.shared.b64 [bar], 32; @%p0 mbarrier.init.shared.b64 [bar+8], 32;
@%p0 mbarrier.init.shared.b64 [bar+16], 32; @%p0 mbarrier.init.shared.b64 [bar+24], 32;
bar.sync 0;
and.b32 %r4, %r0, 31; shl.b32 %r4, %r4, 2; add.u32 %r4, %r4, %r2;
mov.u32 %r5, 0; mov.u32 %r20, 0; mov.u32 %r9, bar;
LOOP:
and.b32 %r6, %r5, 1; shr.u32 %r7, %r5, 1; and.b32 %r7, %r7, 1;
mad.lo.u32 %r8, %r6, 128, %r4; mad.lo.u32 %r10, %r6, 8, %r9;
@%p2 bra CONSUME;
xor.b32 %r7, %r7, 1;
{wait("%r7", "%r10+16", form)}
mad.lo.u32 %r11, %r5, 100, %r0; st.shared.u32 [%r8], %r11;
mbarrier.arrive.shared.b64 _, [%r10];
bra.uni NEXT;
CONSUME:
{wait("%r7", "%r10", form)}
ld.shared.u32 %r11, [%r8]; add.u32 %r20, %r20, %r11;
mbarrier.arrive.shared.b64 _, [%r10+16];
NEXT:
add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 7; @%p4 bra LOOP;
mul.wide.u32 %d5, %r0, 4; add.u64 %d5, %d5, %d0; st.global.u32 [%d5], %r20;"""
    out = np.zeros(64, np.uint32)
    machine.reset_counters()
    with sm90(order=order, seed=4, fuel=7 if order == "seeded" else 20000, check=1, count=1):
        machine.run(kernel(body), "k", out, block=64)
    assert out[32:].tolist() == [2100 + 7 * lane for lane in range(32)]
    (counted,) = machine.counters()
    if form == "try_wait":
        assert counted["opcodes"]["mbarrier.try_wait.parity.shared::cta.b64"]["lanes"] == 2 * 7 * 32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("noinc", ["", ".noinc"])
def test_copies_arrive(noinc: str, mode: str) -> None:
    """cp.async.mbarrier.arrive of one warp releases another; .noinc takes part in the count."""
    body = f"""
{init(32 if noinc else 33)}
shl.b32 %r4, %r0, 4; and.b32 %r5, %r4, 511; add.u32 %r6, %r5, %r2;
cvt.u64.u32 %d2, %r5; add.u64 %d3, %d0, %d2; add.u64 %d4, %d1, %d2;
setp.eq.u32 %p4, %r0, 32;
@%p2 bra CONSUME;
cp.async.cg.shared.global [%r6], [%d3], 16;
cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [bar];
{"" if noinc else "mbarrier.arrive.shared.b64 _, [bar];"}
ret;
CONSUME:
{"" if noinc else "@%p4 mbarrier.arrive.shared.b64 _, [bar];"}
{wait("0")}
xor.b32 %r6, %r6, 16; ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r6];
st.global.v4.u32 [%d4], {{%r10, %r11, %r12, %r13}};"""
    data, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    with sm90(**{"async": mode, "check": 1}):
        machine.run(kernel(body, 2), "k", data, out, block=64)
    assert out.tolist() == data.reshape(16, 2, 4)[:, ::-1].ravel().tolist()


def test_waits_end_after_a_time() -> None:
    """A try_wait on a phase that never ends returns false, so that a kernel can do other work."""
    body = """
@!%p0 bra DONE;
mbarrier.init.shared.b64 [bar], 2;
mov.u32 %r5, 0;
AGAIN:
mbarrier.try_wait.parity.shared.b64 %p3, [bar], 0;
@%p3 bra OUT;
add.u32 %r5, %r5, 1;
mbarrier.arrive.shared.b64 _, [bar];
bra AGAIN;
OUT: st.global.u32 [%d0], %r5;
DONE:"""
    out = np.zeros(1, np.uint32)
    with sm90():
        machine.run(kernel(body), "k", out)
    assert out[0] == 2


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_wait_beside_a_flag_of_another_block(order: str) -> None:
    """Block 1 sets the flag after 100 failed waits; block 0 sees it between failed waits and
    completes its own phase."""
    body = """
setp.eq.u32 %p3, %r1, 1; @%p3 bra OTHER;
@!%p0 bra DONE;
mbarrier.init.shared.b64 [bar], 1;
AGAIN: mbarrier.try_wait.parity.shared.b64 %p4, [bar], 0; @%p4 bra DONE;
ld.relaxed.gpu.global.u32 %r5, [%d0]; setp.eq.u32 %p5, %r5, 0; @%p5 bra AGAIN;
mbarrier.arrive.shared.b64 _, [bar]; bra AGAIN;
OTHER: mov.u32 %r5, 0; @!%p0 bra DONE;
mbarrier.init.shared.b64 [bar], 1;
SPIN: mbarrier.try_wait.parity.shared.b64 %p4, [bar], 0;
add.u32 %r5, %r5, 1; setp.lt.u32 %p5, %r5, 100; @%p5 bra SPIN;
st.relaxed.gpu.global.u32 [%d0], 1;
DONE:"""
    with sm90(order=order, resident_blocks=1):
        machine.run(kernel(body), "k", np.zeros(1, np.uint32), grid=2)


def test_deadlock_names_the_mbarrier() -> None:
    body = init(3) + "@%p2 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 96;\n@%p2 ret;\n"
    body = body.replace("@%p2 mb", "setp.eq.u32 %p3, %r0, 32;\n@%p3 mb")
    with sm90(), pytest.raises(MachineError) as error:
        machine.run(kernel(body + wait("0")), "k", np.zeros(1), block=64)
    report = str(error.value)
    assert report.startswith("k: deadlock in block (0, 0, 0)")
    assert "warp 0, lanes 0xffffffff, line " in report
    assert (
        "waits for the mbarrier at shared address 0x400 (bar): phase of parity 0 lacks 2 of 3 "
        "arrivals and 96 bytes" in report
    )


@pytest.mark.parametrize(
    ("statement", "report"),
    [
        ("mbarrier.arrive.shared.b64 _, [bar+8];", "0x408: no mbarrier"),
        ("mbarrier.init.shared.b64 [bar], 0;", "must be from 1 to 1048575; got 0"),
        ("mbarrier.init.shared.b64 [bar+4], 1;", "not a multiple of 8"),
        ("mbarrier.arrive.shared.b64 _, [bar], 3;", "arrival of 3 at an mbarrier that lacks 2"),
        ("mbarrier.arrive.noComplete.shared.b64 %d1, [bar], 2;", "noComplete arrival that compl"),
        ("mbarrier.expect_tx.shared.b64 [bar], 1048576;", "1048576 pending bytes"),
        ("mbarrier.inval.shared.b64 [bar]; mbarrier.arrive.shared.b64 _, [bar];", "no mbarrier"),
        ("mbarrier.try_wait.parity.shared.b64 %p3, [bar], 2;", "parity: must be 0 or 1; got 2"),
        ("mbarrier.test_wait.shared.b64 %p3, [bar], 7;", "the state is none of an mbarrier"),
        (
            "mbarrier.frob.shared.b64 [bar];",
            "line 20: mbarrier.frob.shared.b64 [bar]: unknown modifier .frob",
        ),
        ("mbarrier.arrive.global.b64 _, [bar];", "unknown form of mbarrier"),
        ("mbarrier.test_wait.parity.expect_tx.shared.b64 %p3, [bar], 1;", "unknown form of mba"),
        (
            "mov.u32 %r5, bar; mov.u32 %r4, 0; mapa.shared::cluster.u32 %r6, %r5, %r4; "
            "cvt.u64.u32 %d2, %r6; cvta.shared.u64 %d3, %d2; mbarrier.arrive.b64 _, [%d3];",
            "an mbarrier of block 0 of the cluster needs .shared::cluster",
        ),
        ("mbarrier.arrive.noComplete.shared.b64 %d1, [bar];", "unknown form of mbarrier"),
    ],
)
def test_misuse(statement: str, report: str) -> None:
    body = "@!%p0 bra DONE;\nmbarrier.init.shared.b64 [bar], 2;\n" + statement + "\nDONE:"
    with sm90(), pytest.raises(MachineError) as error:
        machine.run(kernel(body), "k", np.zeros(1))
    assert report in str(error.value)


def test_a_consumer_that_sleeps_for_two_phases() -> None:
    """The producer waits for one of two consumers, which is right while the other one keeps up."""

    def body(count: int) -> str:
        arrive = "mbarrier.arrive.shared::cta.b64 _, [bar+8];\n"
        other = arrive * (count == 2)
        return (
            f"@%p0 mbarrier.init.shared::cta.b64 [bar+8], {count};\n{init(1)}"
            "mov.u32 %r5, %laneid; setp.ne.u32 %p3, %r5, 0; @%p3 ret;\n"
            "setp.eq.u32 %p4, %r3, 2; @%p2 bra FIRST; @%p4 bra SECOND;\n"
            + "".join(
                "mbarrier.arrive.shared::cta.b64 _, [bar];\n" + wait(parity, "bar+8")
                for parity in "01"
            )
            + f"ret;\nFIRST: {wait('0')}{arrive}{wait('1')}{arrive}ret;\n"
            + f"SECOND: {wait('0')}{other}{wait('1')}{other}"
        )

    def run(count: int, **options: object) -> None:
        with sm90(check=1, watchdog=1, **options):
            machine.run(kernel(body(count)), "k", np.zeros(4, np.uint32), block=96)

    for seed in range(8):
        run(2, order="sleepy", seed=seed)
    for order in ("forward", "reverse"):
        run(1, order=order)
    with pytest.raises(MachineError, match="deadlock"):
        for seed in range(8):
            run(1, order="sleepy", seed=seed)
