"""A server over a fake backend, one a module, its backend as new for each test."""

from collections.abc import Iterator

import pytest

from .fakes import Server


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.backend.reset()
    return running
