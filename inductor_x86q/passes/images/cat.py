"""Cats of int8 images, part of the images stage: each is an operator of ours, and adds to another one whose images it repeats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import aliasing, qdq
from inductor_x86q.graph.library import CAT
from inductor_x86q.graph.reasons import No
from inductor_x86q.kernels.convolution import FEW_CHANNELS
from inductor_x86q.passes.images.image import call, have_sizes
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


def _find_cat(node: fx.Node) -> list[fx.Node] | No:
    value = qdq.value(node)
    if value.dtype not in (torch.uint8, torch.int8) or value.dim() != 4:
        return No("it joins no int8 images")
    arguments = qdq.schema_arguments(node)
    images: list[fx.Node] = arguments["tensors"]
    if arguments["dim"] not in (1, -3):
        return No("it does not join channels")
    values = [qdq.value(image) for image in images]
    if any(image.dtype != value.dtype or image.dim() != 4 for image in values):
        return No("its images have other types or sizes")
    if not have_sizes(*values):
        return No("a size is not known when compiling, or is 0")
    return images if value.shape[1] > FEW_CHANNELS else No("convolutions take so few channels in contiguous format too")


def _rewrite_cat(node: fx.Node, images: list[fx.Node]) -> fx.Node:
    """Inductor has no kernel for a cat of integers, and calls eager mode's.

    cat(a, b, c), cat(a, b) → cat(cat(a, b), c): the second cat's memory can be part of the first one's.
    """
    from inductor_x86q.inductor.lowering import cat  # noqa: F401  registers with Inductor, which is slow to import

    return call(CAT, images, like=node)


def _find_continued(node: fx.Node) -> list[fx.Node] | No:
    """The longest other cat with which this one begins, as densely connected networks have them, and the other images."""
    images = _images(node)
    others = {other: _images(other) for other in _beginning_with(images[0])}
    fronts = {
        other: its for other, its in others.items()
        if its == images[: len(its)] != images and not aliasing.is_overwritten(other)
    }  # fmt: skip
    front = max(fronts, key=lambda other: len(fronts[other]), default=None)
    if front is None or front in node.all_input_nodes:
        return No("no other cat has the same images in front")
    return [front, *images[len(fronts[front]) :]]


def _images(cat: fx.Node) -> list[fx.Node]:
    """The images that a cat joins, itself or through cats that it adds to."""
    found: list[fx.Node] = []
    pending = [cat]
    while pending:
        node = pending.pop()
        if node.target is CAT:
            joined: Any = node.args[0]
            pending += reversed(joined)
        else:
            found.append(node)
    return found


def _beginning_with(image: fx.Node) -> Iterator[fx.Node]:
    """The cats whose first image it is, themselves or through cats that they add to."""
    pending = [image]
    while pending:
        node = pending.pop()
        if node is not image:
            yield node
        pending += [user for user in reversed(node.users) if user.target is CAT and user.all_input_nodes[0] is node]


RULES = (
    Rule("cat of images", (aten.cat.default,), _find_cat, _rewrite_cat),
    Rule("cat that goes on", (CAT,), _find_continued, _rewrite_cat),
)
