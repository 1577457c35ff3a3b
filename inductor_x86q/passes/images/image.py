"""What the rules of the images stage share: whether an image's sizes are known, and a node that calls an operator of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq


def have_sizes(*images: torch.Tensor) -> bool:
    """Whether all sizes of these fake tensors are known when compiling, and none is 0."""
    return all(isinstance(size, int) and size > 0 for image in images for size in image.shape)


def call(target: Any, *arguments: Any, like: fx.Node) -> fx.Node:
    new = qdq.call(target, *arguments, like=like)
    new.meta["original_aten"] = target  # which Inductor names the kernel by
    return new
