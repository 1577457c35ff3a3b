"""What Inductor generates without us, to be compared."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._inductor.utils import run_and_get_code


def comparable(code: str) -> str:
    """Code without what differs from one compile to the next: paths, addresses, remarks."""
    return re.sub(r"(/[^\s'\"]*|0x[0-9a-f]+|# .*)", "", code)


def stock_code(model: torch.nn.Module, x: Any, freezing: bool = True) -> list[str]:
    """What Inductor generates, to be compared.

    The graph caches are off, since a hit generates nothing; compiled kernels are still found in theirs.
    """
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(freezing=freezing, fx_graph_cache=False),
    ):
        codes = run_and_get_code(torch.compile(model), x)[1]
    return [comparable(code) for code in codes]
