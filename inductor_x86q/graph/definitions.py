"""The library of torch's that our operators are in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("inductor_x86q", "DEF")


def define(schema: str, function: Callable[..., Any]) -> None:
    """Defines an operator, which is what the function computes of the arguments in order."""
    LIBRARY.define(schema)
    LIBRARY.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
