"""Malformed PTX: each text must be accepted, or refused with a MachineError, within limits of time
and memory.

python fuzz_texts.py TRIES SEED FILE... changes PTX texts at random, loads and decodes each in a
child process, and prints those that crash the child, with the seeds that reproduce them.
"""

from __future__ import annotations

import mmap
import os
import random
import re
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from machine import MachineError, machine

TOKEN = re.compile(r'"[^"]*"|[%$]?\w+|\.\w+|\s+|.', re.S)
NUMBERS = (
    *("", "-1", "0", "1", "3", "7", "31", "32", "4294967295", "4294967296", "536870913", "99999"),
    *("18446744073709551615", "99999999999999999999", "0x", "0b", "0f", "0f3F80000", "0d1", "x"),
    *("1.5", "1e9", "1e999", "0xffffffffffffffff", "9223372036854775807", "08", "0U", "WARP_SZ"),
)
PIECES = (
    *('"', "{", "}", "(", ")", "[", "]", "<", ">", ";", ",", ":", "::", "@", "@!", ".", "|", "="),
    *("_", "!", "%", "+", "-", "/*", "//", "\n", "\0", "\u00e9", "[]", "{}", "()", ".align", ".v4"),
    *(".b128", ".f16x2", ".pred", ".param", ".reg", ".shared", ".extern", ".entry", ".func"),
)
SECONDS = 10  # per text
MAX_MEMORY = 512 << 20  # bytes above the process's own, for all texts of a child
TRIES_OF_CHILD = 500


def changed(text: str, choice: random.Random) -> str:
    """The text after one to three random changes of its tokens."""
    tokens = TOKEN.findall(text)
    for _ in range(choice.randint(1, 3)):
        at, other = (choice.randrange(len(tokens)) for _ in range(2))
        kind = choice.randrange(8)
        if kind == 0:
            tokens[at] = ""
        elif kind == 1:
            tokens[at] *= 2
        elif kind == 2:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        elif kind == 3:
            numbers = [i for i, token in enumerate(tokens) if token[:1].isdigit()]
            tokens[choice.choice(numbers or [at])] = choice.choice(NUMBERS)
        elif kind == 4:
            tokens[at] = choice.choice(PIECES)
        elif kind == 5:
            tokens[at] = tokens[other]
        elif kind == 6:
            del tokens[at : at + choice.randint(1, 8)]
        elif choice.randrange(4) == 0:  # truncate the text
            del tokens[at:]
        tokens = tokens or [" "]
    return "".join(tokens)


def decode(text: str) -> bool:
    """True if the machine accepts the text. Each kernel is decoded; the launch itself is refused,
    as the grid is empty."""
    try:
        module = machine.load(text)
    except MachineError:
        return False
    taken = True
    nothing, block = (np.array(x, np.uint32).ctypes for x in ([0, 1, 1], [32, 1, 1]))
    for name in module.parameters:
        error = machine.library.ptxvm_launch(module._handle, name.encode(), nothing, block, 0, None)
        assert error in (9, 218), error  # cudaErrorInvalidConfiguration, cudaErrorInvalidPtx
        taken &= error == 9
    return taken


def seed_of(seed: int, number: int) -> random.Random:
    return random.Random(seed << 32 | number)


def text_of(texts: Sequence[str], seed: int, number: int) -> str:
    choice = seed_of(seed, number)
    return changed(choice.choice(texts), choice)


def in_child(texts: Sequence[str], seed: int, first: int, last: int) -> tuple[int, int, str]:
    """Number of the text after the last one tried, how many were accepted, and the error if any."""
    shared = mmap.mmap(-1, 16)
    counts = np.frombuffer(shared, np.int64)
    child = os.fork()
    if child == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for counts[0] in range(first, last):
            signal.alarm(SECONDS)
            try:
                counts[1] += decode(text_of(texts, seed, int(counts[0])))
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
        os._exit(2 if grown > MAX_MEMORY else 0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    why = {0: "", 1: "another error", 2: "memory", -signal.SIGALRM: "hangs"}.get(code, f"{code}")
    return int(counts[0]) + 1, int(counts[1]), why


def fuzz(texts: Sequence[str], tries: int, seed: int) -> tuple[int, list[tuple[int, str]]]:
    """How many texts the machine accepted, and number and error of each text that failed."""
    taken, found, first = 0, [], 0
    while first < tries:
        last = min(first + TRIES_OF_CHILD, tries)
        first, more, why = in_child(texts, seed, first, last)
        taken += more
        if why:
            found.append((first - 1, why))
    return taken, found


def main(tries: int, seed: int, paths: Sequence[str]) -> None:
    texts = [Path(path).read_text() for path in paths]
    if tries < 0:  # negative tries: the unchanged text
        print(text_of(texts, seed, -tries - 1))
        return
    taken, found = fuzz(texts, tries, seed)
    print(f"{tries} texts, {taken} taken; wrong: {found}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
