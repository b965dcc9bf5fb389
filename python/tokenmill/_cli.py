"""Command-line helpers: a bad argument is one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import registry

PROGRAM = "python -m tokenmill"
HELP = re.compile(r"-h|--h(el?|elp)?")


class UsageError(Exception):
    """A command that cannot run as given: `argument: rule; got value`."""

    def __init__(self, message: str, command: str = "") -> None:
        super().__init__(message)
        self.command = command  # "" stands for the running command


def check_plot(option: str, extra: str) -> None:
    """Raises if matplotlib, with which this option draws, is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{option}: needs matplotlib (pip install tokenmill[{extra}])")


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing its usage."""

    @property
    def command(self) -> str:
        return self.prog.removeprefix("python -m ")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """An unknown command is answered with similar names instead of the full list."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            like = registry.did_you_mean(str(value), action.choices)
            rule = f"no command '{value}'{like}; {self.prog} --help lists all"
            raise argparse.ArgumentError(action, rule)
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "), self.command)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """If a command line fails because of unknown options, the error names them rather than the
        words after them.
        """
        try:
            return super().parse_known_args(args, namespace)
        except UsageError as error:
            unknown, rest = self._split(list(args or ()))
            if not unknown or error.command != self.command or self._error_of(rest) == str(error):
                raise
            self.error(f"unrecognized arguments: {' '.join(unknown)}")

    def _split(self, words: list[str]) -> tuple[list[str], list[str]]:
        """Unknown options, and the remaining words without their possible values. --help is
        dropped: it would take effect.
        """
        end = words.index("--") if "--" in words else len(words)
        unknown, rest, takes = [], [], False
        for word in words[:end]:
            if self._is_unknown_option(word):
                unknown.append(word)
                takes = "=" not in word
                continue
            if (word.startswith("-") or not takes) and not HELP.fullmatch(word):
                rest.append(word)
            takes = False
        return unknown, rest + words[end:]

    def _error_of(self, words: list[str]) -> str:
        try:
            super().parse_known_args(words)
        except UsageError as error:
            return str(error)
        return ""

    def _is_unknown_option(self, word: str) -> bool:
        name = word.partition("=")[0]
        if not re.match(r"--?[A-Za-z]", name):
            return False
        return not any(option.startswith(name) for option in self._option_string_actions)


def operator(name: str) -> str:
    """Parses the name of an operator."""
    try:
        return registry.get(name).name
    except registry.UnknownOperator:
        like = registry.did_you_mean(name, registry.ops())
        rule = f"no operator '{name}'{like}; {PROGRAM} ops lists all"
        raise argparse.ArgumentTypeError(rule) from None


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Parses an integer from least to most."""
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


def seconds(value: str) -> float:
    """Parses a finite time in seconds."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0; got '{value}'")
    return number


def duration(value: str) -> float:
    """Parses "90", "90s", "10m" or "1h30m" as seconds."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", value)
    total = 0.0
    if found:
        hours, minutes, rest = (float(part or 0) for part in found.groups())
        total = 3600 * hours + 60 * minutes + rest
    if not 0 < total < math.inf:
        rule = "must be a time of more than 0 such as 90s, 10m or 1h30m"
        raise argparse.ArgumentTypeError(f"{rule}; got '{value}'")
    return total


def writable_folder(argument: str, folder: Path) -> Path:
    """Parses a folder, created if missing. Checked before work whose results would be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".tokenmill"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(unwritable(argument, folder, error)) from None
    return folder


def write_json(argument: str, path: Path, document: dict[str, Any]) -> None:
    write_text(argument, path, json.dumps(document, indent=1) + "\n")


def write_text(argument: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(unwritable(argument, path, error)) from None
    print(f"wrote {path}")


def unwritable(argument: str, path: Path | str | None, error: OSError) -> str:
    return f"{argument}: must be writable; got '{path}' ({error.strerror})"


def one_line(error: Exception) -> str:
    """An exception for a table row: the first line of its message, cut at 160 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
