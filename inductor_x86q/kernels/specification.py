"""What a kernel of ours has to compute for a layer, as the passes decide it and as lowering is told."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from inductor_x86q.kernels.convolution import Convolution
from inductor_x86q.kernels.epilogue import Epilogue

_SIZES = ("n", "h", "w")  # of the image, which lowering knows
_PLACES = ("x_strides", "x_channel", "other_pixel", "out_pixel", "threads")  # which lowering decides


@dataclasses.dataclass(frozen=True)
class Specification:
    """All of a layer that its packed constants depend on, and what is done to its sums."""

    convolution: Convolution
    epilogue: Epilogue

    def text(self) -> str:
        """As an argument of an operator, without what lowering adds."""
        convolution = dataclasses.asdict(self.convolution)
        kept = {name: value for name, value in convolution.items() if name not in (*_SIZES, *_PLACES)}
        return json.dumps({**kept, "epilogue": [_name(value) for value in dataclasses.astuple(self.epilogue)]})

    @staticmethod
    def read(text: str, image: tuple[int, ...]) -> Specification:
        """That text's specification, for images of `image`'s sizes n, h, w, c."""
        values: dict[str, Any] = json.loads(text)
        output, activation, other = values.pop("epilogue")
        kept = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        sizes = dict(zip(_SIZES, image, strict=False))
        return Specification(Convolution(**sizes, **kept), Epilogue(_dtype(output), activation, _dtype(other)))


def _name(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _dtype(name: str | None) -> Any:
    return None if name is None else getattr(torch, name)
