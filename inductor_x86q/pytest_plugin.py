"""Fixtures for pytest: write `pytest_plugins = ["inductor_x86q.pytest_plugin"]` in conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inductor_x86q.inductor import caches


@pytest.fixture(scope="session")
def inductor_cache_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where this session's compiles put their files; shared by its tests, since a precompiled header takes long."""
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture
def isolated_caches(inductor_cache_directory: str) -> Iterator[None]:
    """A test that finds nothing in Dynamo's and Inductor's caches, and leaves nothing there."""
    with caches.isolated_caches(inductor_cache_directory):
        yield
