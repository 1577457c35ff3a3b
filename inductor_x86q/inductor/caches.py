"""Inductor's caches, apart from those of other compiles."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

import torch

from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "caches.py",
    "To generate code anew where a cache would have it, and to test with caches of one's own.",
    (
        Needs("torch._inductor.config", "fx_graph_cache"),
        Needs("torch._inductor.config", "force_disable_caches"),
        Needs("torch._functorch.config", "enable_autograd_cache"),
        Needs("torch._inductor.utils", "clear_caches"),
    ),
    "Options patched in a thread holding for that thread; TORCHINDUCTOR_CACHE_DIR being read at each compile; `clear_caches` "
    "dropping what Inductor remembers.",
)


@contextlib.contextmanager
def graph_caches_off() -> Iterator[None]:
    """Within this context every graph that this thread compiles is generated anew; compiled kernels are still found."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


@contextlib.contextmanager
def isolated_caches(directory: str) -> Iterator[None]:
    """Within this context nothing compiled before is found again, and nothing compiled here is found afterwards.

    Only precompiled headers and shared objects, addressed by their content, are kept in `directory`. For tests: the
    directory and what is forgotten are those of the whole process.
    """
    from torch._inductor import config
    from torch._inductor.utils import clear_caches

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
    _forget(clear_caches)
    try:
        with warnings.catch_warnings(), config.patch(force_disable_caches=True):
            warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
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
