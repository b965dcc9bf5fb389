"""PEP 517 backend: setuptools, plus a torch that is taken from where it already lies.

The extension uses only torch's stable ABI, so any torch >= MIN_TORCH serves as a source of headers
and link stubs. A build environment is isolated from the environment that the wheel is meant for;
this backend looks for torch there by path (never importing it) and asks for a download only when
there is none.
"""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

MIN_TORCH = (2, 10)


def _torch_version(root: Path) -> tuple[int, ...] | None:
    try:
        text = (root / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"__version__[^'\"]*['\"](\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else None


def _search_path() -> list[Path]:
    paths = [sysconfig.get_paths()[key] for key in ("platlib", "purelib")]
    paths += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    return [Path(p) for p in dict.fromkeys([*paths, *filter(None, sys.path)])]


def find_torch() -> Path | None:
    """The folder of a usable torch package, or None. TOKENMILL_TORCH_ROOT names one explicitly."""
    explicit = os.environ.get("TOKENMILL_TORCH_ROOT")
    candidates = [Path(explicit)] if explicit else [p / "torch" for p in _search_path()]
    for root in candidates:
        version = _torch_version(root)
        if version and version >= MIN_TORCH and (root / "include" / "torch").is_dir():
            return root
    if explicit:
        wanted = ".".join(map(str, MIN_TORCH))
        raise SystemExit(
            f"tokenmill build: TOKENMILL_TORCH_ROOT: must hold torch >= {wanted} with its headers; "
            f"got {explicit}"
        )
    return None


def _torch_requirement() -> list[str]:
    return [] if find_torch() else [f"torch>={'.'.join(map(str, MIN_TORCH))}"]


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _torch_requirement()
