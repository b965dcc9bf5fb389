from __future__ import annotations

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """The group of a size, started when a test first wants it."""
    groups: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        if size not in groups or not all(p.is_alive() for p in groups[size].processes):
            groups[size] = Ranks(size)
        return groups[size]

    yield of
    for group in groups.values():
        group.close()
