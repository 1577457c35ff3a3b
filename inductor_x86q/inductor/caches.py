"""Inductor's caches, apart from those of other compiles."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def caches_off(config: Any) -> Iterator[None]:
    with warnings.catch_warnings(), config.patch(force_disable_caches=True):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


@contextlib.contextmanager
def isolated_caches(directory: str) -> Iterator[None]:
    """Within this context nothing compiled before is found again, and nothing compiled here is found afterwards.

    Only precompiled headers and shared objects, addressed by their content, are kept in `directory`. Relies on
    Inductor reading TORCHINDUCTOR_CACHE_DIR at each compile and on `clear_caches` dropping what it remembers.
    """
    from torch._inductor import config
    from torch._inductor.utils import clear_caches

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
    _forget(clear_caches)
    try:
        with caches_off(config):
            yield
    finally:
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
        _forget(clear_caches)


def _forget(clear_caches: Callable[[], None]) -> None:
    torch.compiler.reset()
    clear_caches()
