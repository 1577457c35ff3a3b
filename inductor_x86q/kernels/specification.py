"""What a kernel of ours has to compute for a layer, as the passes decide it and as lowering is told."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from inductor_x86q.kernels import cost
from inductor_x86q.kernels.convolution import Convolution, Depth
from inductor_x86q.kernels.epilogue import Epilogue
from inductor_x86q.kernels.family import Kernel

# How many of the cost model's best kernels are timed, where something is.
TIMED = 2

_PLACES = ("x_strides", "x_channel", "other_pixel", "out_pixel")  # which lowering decides


@dataclasses.dataclass(frozen=True)
class Specification:
    """All of a layer but where its tensors lie: what its packed constants depend on, and the choice of its kernel."""

    convolution: Convolution
    epilogue: Epilogue

    @property
    def kernels(self) -> list[Kernel]:
        """Those that the cost model thinks best, the best first."""
        return [choice for choice in self._ranked() if isinstance(choice, Kernel)][:TIMED]

    @property
    def is_call(self) -> bool:
        """Whether the cost model thinks oneDNN's call better than any of them."""
        return self._ranked()[0] == cost.ONEDNN

    def _ranked(self) -> list[cost.Choice]:
        return cost.choose(self.convolution, self.epilogue)

    def text(self) -> str:
        """As an argument of an operator, without what lowering adds."""
        convolution = dataclasses.asdict(self.convolution)
        kept: dict[str, Any] = {name: value for name, value in convolution.items() if name not in _PLACES}
        return json.dumps({**kept, "epilogue": [_name(value) for value in dataclasses.astuple(self.epilogue)]})

    @staticmethod
    def read(text: str) -> Specification:
        values: dict[str, Any] = json.loads(text)
        output, activation, other, dynamic = values.pop("epilogue")
        depth = Depth(**values.pop("depth"))
        kept: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        epilogue = Epilogue(_dtype(output), activation, _dtype(other), dynamic)
        return Specification(Convolution(depth=depth, **kept), epilogue)


def _name(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _dtype(name: str | None) -> Any:
    return None if name is None else getattr(torch, name)
