"""What to install where a library is missing."""

from __future__ import annotations


def needs(library: str, missing: ModuleNotFoundError) -> ModuleNotFoundError:
    """What to raise where a library is missing whose name is that of its integration and extra."""
    return ModuleNotFoundError(
        f"tokenmill.integrations.{library} needs {library}: pip install 'tokenmill[{library}]'; "
        f"got {missing}",
        name=missing.name,
    )
