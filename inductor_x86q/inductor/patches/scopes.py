"""Where patches are in force: while a graph of ours is compiled, while headers are asked for, while source is collected."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import fx

from inductor_x86q.inductor.patches.patch import Scope

# A graph of ours is compiled; the value runs the passes on it.
COMPILE: Scope[Callable[[fx.Graph], Any]] = Scope("compile")
# Headers are asked for that are to be precompiled by these threads.
HEADERS: Scope[ThreadPoolExecutor] = Scope("headers")
# The source that Inductor generates goes to this function.
SOURCE: Scope[Callable[[str], None]] = Scope("source")
