"""The operator registry: tests, benchmarks, documentation and `python -m tokenmill` all read it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ._call.spec import OpSpec, Sample, Sharding

__all__ = [
    "OpSpec",
    "Sample",
    "Sharding",
    "UnknownOperator",
    "did_you_mean",
    "get",
    "ops",
    "register_op",
]

_specs: dict[str, OpSpec] = {}


def register_op(spec: OpSpec) -> OpSpec:
    _specs[spec.name] = spec
    return spec


def ops() -> dict[str, OpSpec]:
    """All operators by name, sorted by family and name, whichever module was imported first."""
    return dict(sorted(_specs.items(), key=lambda entry: (entry[1].family, entry[0])))


class UnknownOperator(KeyError):
    """Error for a name that no operator has."""

    def __str__(self) -> str:  # KeyError shows the repr of its message
        return str(self.args[0])


def get(name: str) -> OpSpec:
    if name not in _specs:
        raise UnknownOperator(
            f"tokenmill: no operator '{name}'{did_you_mean(str(name), _specs)}; "
            "tokenmill.registry.ops() has all"
        )
    return _specs[name]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A suffix for a message: at most three names that are similar to this one or contain it, in
    parentheses after a space. Empty if there are none.
    """
    names = list(names)
    near = difflib.get_close_matches(name, names, 3, 0.7)
    if len(name) > 2:
        near += sorted((n for n in names if name in n), key=lambda n: (n.index(name), len(n)))
    quoted = [f"'{other}'" for other in dict.fromkeys(near)][:3]
    if not quoted:
        return ""
    listed = " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
    return f" (did you mean {listed}?)"
