"""Errors for missing or old libraries."""

from __future__ import annotations

from .._check import check


def needs(library: str, missing: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise where the library of an integration (also the name of the extra) is
    missing.
    """
    return ModuleNotFoundError(
        f"tokenmill.integrations.{library} needs {library}: pip install 'tokenmill[{library}]'; "
        f"got {missing}",
        name=missing.name,
    )


def check_version(name: str, library: str, version: str, *minimum: int) -> None:
    """Checks that a library is recent enough for a function; name: the function's name."""
    found = tuple(int(part) for part in version.split(".")[:2])
    wanted = ".".join(map(str, minimum))
    check(found >= minimum, name, library, f"must be {wanted} or later", version)
