"""Replacing attributes of torch while a graph of ours is compiled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

# Two compiles in two threads must not patch Inductor's module-level lists under each other's feet. Dynamo holds
# its own lock during torch.compile; ahead-of-time compiles do not take that one.
scope_lock = threading.RLock()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context `owner` has another `name`."""
    original = vars(owner)[name]  # as it is stored: a static method must be put back as one
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
