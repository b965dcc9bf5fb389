"""The process that runs calls, any of which may kill it. It answers each line "first count" on its
standard input with lines on the given file descriptor: "begin", "words", "end" and "ready".
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import sys

import torch

from fuzz import case

MEMORY = 6 << 30  # bytes in addition to the process's memory after its imports


def main() -> None:
    seed, backend, out = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    faulthandler.enable()
    torch.set_num_threads(2)
    if backend == "emulated":
        from tokenmill import _emulator

        _emulator.configure("check=1")
    case.choose(seed, 0, backend)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.collect()
    gc.freeze()

    def say(kind: str, *more: object) -> None:
        os.write(out, (json.dumps([kind, *more]) + "\n").encode())

    say("ready")
    for line in sys.stdin:
        first, count = map(int, line.split())
        for number in range(first, first + count):
            say("begin", number)
            verdict, why = case.check(seed, number, backend, lambda words: say("words", words))
            say("end", verdict, why)
        say("ready")


if __name__ == "__main__":
    main()
