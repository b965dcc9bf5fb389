"""ptxvm run | check | count FILE [ARGS ...]: --help has a guide."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import sys

from . import _cli, command

BROKEN_PIPE = 128 + 13  # exit status of a program that SIGPIPE ends
INTERRUPTED = 128 + 2


def main(argv: list[str] | None = None) -> int:
    """Exit status, as the guide of the command defines it."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for unflushed output
        if error.errno == errno.EPIPE:  # the reader has closed the pipe, as head does
            return BROKEN_PIPE
        print(f"ptxvm: {error.strerror}", file=sys.stderr)
        return command.FAILED


def _run(argv: list[str]) -> int:
    name = "ptxvm"
    at = argv.index("--") if "--" in argv else len(argv)
    own, of_program = argv[:at], argv[at + 1 :]
    try:
        parser = _cli.Parser(prog="ptxvm")
        version = importlib.metadata.version("ptxvm")
        parser.add_argument("--version", action="version", version=f"ptxvm {version}")
        command.add_arguments(parser)
        if not argv:
            parser.print_help()
            return 0
        if own and own[0] in command.ACTIONS:
            name = f"ptxvm {own[0]}"
        options = parser.parse_args(own)
        options.args = [*options.args, *of_program]
        return command.run(options)
    except _cli.UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return command.USAGE
    except _cli.CannotRun as error:
        print(f"{name}: {error}", file=sys.stderr)
        return command.FAILED
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
