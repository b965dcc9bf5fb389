"""The machine against the PTX memory model, in every litmus program, and the page of the table."""

from __future__ import annotations

import pytest
from litmus import PAGE, expected, page, run
from litmus_model import allows, judge
from litmus_programs import Litmus, programs

PROGRAMS = programs()


@pytest.mark.parametrize("test", PROGRAMS, ids=lambda test: test.name)
def test_litmus(test: Litmus) -> None:
    ideal, result = expected(test), run(test)
    assert result.race == ideal.race
    assert ideal.allowed or not result.seen
    # An allowed outcome is shown, or a race says that more is allowed, or the table says why not.
    assert result.seen or not ideal.allowed or ideal.race or test.remark


def test_page_is_current() -> None:
    made = page(PROGRAMS)
    assert PAGE.read_text() == made, "python tests/litmus.py rewrites it"


def test_names_are_unique() -> None:
    assert len({test.name for test in PROGRAMS}) == len(PROGRAMS) >= 40


@pytest.mark.parametrize(
    ("threads", "outcome", "allowed", "race"),
    [
        # Figures and examples of the PTX ISA and of Lustig et al., ASPLOS 2019.
        (("st x 1; st.release.gpu f 1", "ld.acquire.gpu r0 f; if r0 1; ld r1 x"),
         "r0=1 r1=0", False, False),
        (("st.relaxed.gpu x 1; fence.sc.gpu; ld.relaxed.gpu r0 y",
          "st.relaxed.gpu y 1; fence.sc.gpu; ld.relaxed.gpu r1 x"), "r0=0 r1=0", False, False),
        (("ld.relaxed.gpu r0 x; st.relaxed.gpu y r0", "ld.relaxed.gpu r1 y; st.relaxed.gpu x r1"),
         "r0=1 r1=1", False, False),
        (("st x 1", "ld r0 x"), "r0=0", True, True),
        (("atom.relaxed.gpu.add r0 x 1", "st.relaxed.gpu x 5"), "r0=0 x=1", False, False),
    ],
)  # fmt: skip
def test_model(threads: tuple[str, ...], outcome: str, allowed: bool, race: bool) -> None:
    verdict = judge(threads, "gpu")
    assert (allows(verdict, outcome), verdict.race) == (allowed, race)
