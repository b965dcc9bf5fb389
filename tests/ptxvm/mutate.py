"""Seeded faults in the PTX of a kernel: what a slip in a kernel's source would leave there.

An edit keeps the length of the text, so that it can also be made inside a compiled library.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

Edit = Callable[[re.Match[str], random.Random], str]


@dataclass(frozen=True)
class Mutation:
    kernel: str  # found in the name of the entry
    kind: str
    seed: int  # which of the places

    def __str__(self) -> str:
        return f"{self.kernel}-{self.kind}-{self.seed}"


@dataclass(frozen=True)
class Change:
    line: int  # in the text, from 1
    before: str
    after: str


def _blank(found: re.Match[str], _: random.Random) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def _digits(shift: Callable[[int, random.Random], int]) -> Edit:
    """Another number of as many digits in place of the group `n`."""

    def edit(found: re.Match[str], choice: random.Random) -> str:
        old = found["n"]
        start = found.start("n") - found.start()
        new = str(shift(int(old), choice))
        if len(new) != len(old) or new[0] == "-":
            new = str(max(int(old) - 1, 0)).rjust(len(old))
        return found[0][:start] + new + found[0][start + len(old) :]

    return edit


def _lane(found: re.Match[str], _: random.Random) -> str:
    """A distance that the reduction has twice then, and another not at all."""
    group = "n" if found["n"] else "m"
    old, start, end = found[group], found.start(group) - found.start(), found.end(group)
    new = str(int(old) // 2 or 2).rjust(len(old))
    return found[0][:start] + new + found[0][end - found.start() :]


def _swap(found: re.Match[str], _: random.Random) -> str:
    a, b = sorted(("a", "b"), key=found.start)
    text, base = found[0], found.start()
    spans = [(found.start(g) - base, found.end(g) - base) for g in (a, b)]
    (i, j), (k, m) = spans
    return text[:i] + text[k:m] + text[j:k] + text[i:j] + text[m:]


_COMPARISONS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}


def _compare(found: re.Match[str], _: random.Random) -> str:
    return found[0].replace(f".{found['op']}.", f".{_COMPARISONS[found['op']]}.", 1)


KINDS: dict[str, tuple[str, Edit]] = {
    "barrier dropped": (r"(bar\.sync|barrier\.sync)[^;]*;", _blank),
    "wait weakened": (r"cp\.async\.wait_group[ \t]+(?P<n>\d+)", _digits(lambda n, _: n + 1)),
    "wait dropped": (r"cp\.async\.wait_(group|all)[^;]*;", _blank),
    # nvcc moves the lane into a register before the shuffle; Triton writes it there.
    "lane": (
        r"mov\.[ub]32[ \t]+%r\d+, (?P<n>1|2|4|8|16);(?=\n([^\n]*\n){0,3}[^\n]*shfl\.sync)"
        r"|shfl\.sync\.(bfly|down|up|idx)\.b32[^;]*, (?P<m>1|2|4|8|16), \d+, -1",
        _lane,
    ),
    "swizzle": (r"xor\.b32[^;]*, (?P<n>\d+);", _digits(lambda n, c: n ^ (1 << c.choice([3, 4])))),
    "address": (
        r"(ld|st|cp\.async|ldmatrix)[.\w:]*[ \t][^;]*\[%\w+\+(?P<n>\d+)\]",
        _digits(lambda n, c: n + c.choice([-4, 4, -16, 16])),
    ),
    "constant": (
        r"(add|sub|shl|shr|mad\.lo|mul\.lo|mul\.wide)\.[su]?b?\w+[ \t][^;]*, (?P<n>\d+);",
        _digits(lambda n, c: n + c.choice([-1, 1])),
    ),
    "guard dropped": (r"@!?%p\d+ (?!bra)(?=\w)", _blank),
    "comparison": (r"setp\.(?P<op>lt|le|gt|ge|eq|ne)\.[su]\d\d[^;]*;", _compare),
    "operands": (r"(sub|selp)\.[fbsu]\d\d[ \t]+%\w+, (?P<a>%\w+), (?P<b>[^,;]+)[^;]*;", _swap),
    "addend": (
        r"fma\.rn\.f32[ \t]+%\w+, (?P<a>%f\d+|%r\d+), [^,;]+, (?P<b>%f\d+|%r\d+);",
        _swap,
    ),
    "fragment": (
        r"mma\.sync[^;{]*\{[^}]*\}[,\s]*\{\s*(?P<a>%\w+),\s*(?P<b>%\w+)[^;]*;",
        _swap,
    ),
    "matrix": (r"ldmatrix[^;{]*\{\s*(?P<a>%\w+),\s*(?P<b>%\w+)[^;]*;", _swap),
}


def bodies(text: str) -> dict[str, tuple[int, int]]:
    """Where the body of each entry lies."""
    entries = list(re.finditer(r"\.entry[ \t]+(\w+)", text))
    found = {}
    for i, entry in enumerate(entries):
        name, start = entry[1], entry.start()
        end = entries[i + 1].start() if i + 1 < len(entries) else len(text)
        close = text.find("\n}", start, end)
        found[name] = (start, close if close >= 0 else end)
    return found


def places(text: str, kernel: str, kind: str) -> list[re.Match[str]]:
    pattern = re.compile(KINDS[kind][0])
    found = []
    for name, (start, end) in bodies(text).items():
        if kernel not in name:
            continue
        constants = set(re.findall(r"mov\.f32[ \t]+(%\w+), 0f", text[start:end]))
        for place in pattern.finditer(text, start, end):
            # A product with a constant belongs to expf or logf: many ways to split their argument
            # are equally good.
            if kind == "addend" and constants & set(re.findall(r"%\w+", place[0])):
                continue
            # shr.s32 takes 32 for 31: the same program.
            if kind == "constant" and re.match(r"shr\.s32[^;]*, 31;", place[0]):
                continue
            found.append(place)
    return found


def mutate(text: str, mutation: Mutation) -> tuple[str, Change]:
    """The text with one fault; the same one every time."""
    choice = random.Random(str(mutation))
    edit = KINDS[mutation.kind][1]
    candidates = places(text, mutation.kernel, mutation.kind)
    choice.shuffle(candidates)
    for found in candidates[mutation.seed % max(len(candidates), 1) :] + candidates:
        new = edit(found, choice)
        if new != found[0] and len(new) == len(found[0]):
            line = text.count("\n", 0, found.start()) + 1
            changed = text[: found.start()] + new + text[found.end() :]
            return changed, Change(line, found[0].strip(), new.strip())
    raise LookupError(f"{mutation}: no such place")
