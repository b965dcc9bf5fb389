"""Errors of the command line: one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UsageError(Exception):
    """A command line that cannot run: `argument: rule; got value`."""


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
