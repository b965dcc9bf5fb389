"""What actions of the command line share: errors, which are one line on stderr, options of the
machine, and output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UsageError(Exception):
    """A command line that cannot run: `argument: rule; got value`."""


class CannotRun(Exception):
    """A program or a text that fails before anything is checked: one line on stderr and exit status
    3."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Returns a parser of integers from minimum to maximum."""
    rule = f"must be a whole number of at least {minimum}"
    if maximum is not None:
        rule = f"must be a whole number from {minimum} to {maximum}"

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is None or number < minimum or (maximum is not None and number > maximum):
            raise argparse.ArgumentTypeError(f"{rule}; got '{value}'")
        return number

    return parse


def unwritable(argument: str, path: Path, error: OSError) -> str:
    return f"{argument}: must be writable; got '{path}' ({error.strerror})"


def machine_options(options: argparse.Namespace) -> dict[str, int | str]:
    """Options of the machine that apply to all runs."""
    chosen: dict[str, int | str] = {
        name: int(options.action == name) for name in ("check", "count")
    }
    goes_on = options.action == "count" or getattr(options, "on_fault", "stop") == "report"
    chosen["on_fault"] = "collect" if goes_on else "stop"
    for name in ("device", "fuel", "mma"):
        if (value := getattr(options, name)) is not None:
            chosen[name] = value
    return chosen | dict(options.settings)


def say(options: argparse.Namespace, line: str) -> None:
    """Prints a line; to standard error if standard output carries JSON."""
    print(line, file=sys.stderr if options.json else sys.stdout)
