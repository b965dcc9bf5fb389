"""None in tuples for Triton 3.6, which torch 2.10 and 2.11 require.

Its compiler makes tensors of the members of a tuple that a device function returns, and types of
the members of every new tuple, and has neither for None. Later versions keep None.
"""

from __future__ import annotations

from typing import Any

import triton


def accept_none() -> None:
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    from triton.language import core, semantic

    to_tensor, type_of = semantic.TritonSemantic.to_tensor, core._type_for_tuple_values

    def to_tensor_or_none(self: Any, x: Any, check_type: bool = True) -> Any:
        none = x is None or (isinstance(x, core.constexpr) and x.value is None)
        return x if none else to_tensor(self, x, check_type)

    def type_with_none(values: Any, fields: Any = None) -> Any:
        return type_of([core.constexpr(x) if x is None else x for x in values], fields)

    semantic.TritonSemantic.to_tensor = to_tensor_or_none
    core._type_for_tuple_values = type_with_none
