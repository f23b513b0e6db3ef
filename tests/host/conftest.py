"""A host and the world outside it, as namespaces. A module that shares one pair has its own ``places``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guests.namespaces import Namespace, world


@pytest.fixture
def places() -> Iterator[tuple[Namespace, Namespace]]:
    with world() as both:
        yield both


@pytest.fixture
def host(places: tuple[Namespace, Namespace]) -> Namespace:
    return places[0]


@pytest.fixture
def outside(places: tuple[Namespace, Namespace]) -> Namespace:
    return places[1]
