"""What to install where a library is missing."""

from __future__ import annotations

from .._check import check


def needs(library: str, missing: ModuleNotFoundError) -> ModuleNotFoundError:
    """What to raise where a library is missing whose name is that of its integration and extra."""
    return ModuleNotFoundError(
        f"tokenmill.integrations.{library} needs {library}: pip install 'tokenmill[{library}]'; "
        f"got {missing}",
        name=missing.name,
    )


def check_version(name: str, library: str, version: str, *least: int) -> None:
    """That a library is as new as a function needs: name is the function's."""
    found = tuple(int(part) for part in version.split(".")[:2])
    wanted = ".".join(map(str, least))
    check(found >= least, name, library, f"must be {wanted} or later", version)
