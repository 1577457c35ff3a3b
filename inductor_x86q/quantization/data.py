"""Calibration data as people have it: what a data loader yields becomes calls of the model."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from inductor_x86q.errors import QuantizationError


class Calls:
    """The calls that calibration data stands for, as often as it can be read.

    A batch of (images, labels) is a call with images where the model takes one argument: what it does not take is left
    out, which a warning says once.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        example_inputs: tuple[Any, ...],
        transform: Callable[[Any], Any] | None = None,
        max_batches: int | None = None,
    ) -> None:
        if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
            raise QuantizationError(f"max_batches is {max_batches!r}: expected a number of batches, at least 1")
        if transform is not None and not callable(transform):
            raise QuantizationError(
                f"transform is a {type(transform).__name__}: expected a function from what calibration yields to a call"
            )
        self.batches, self.taken = batches, len(example_inputs)
        self.transform, self.max_batches = transform, max_batches
        self.warned = False
        self.first: list[Any] = []  # the first of the calls, once they have been read

    def __iter__(self) -> Iterator[Any]:
        for batch in itertools.islice(self.batches, self.max_batches):
            call = self.transform(batch) if self.transform is not None else batch
            fitting = self._fitting(tuple(call)) if isinstance(call, (tuple, list)) else call
            self.first = self.first or [fitting]
            yield fitting

    def __length_hint__(self) -> int:
        length = operator.length_hint(self.batches)
        return length if self.max_batches is None else min(length, self.max_batches)

    def _fitting(self, call: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(call) <= self.taken or not self.taken:
            return call
        if not self.warned:
            self.warned = True
            rest = ", ".join(
                f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
                for x in call[self.taken :]
            )
            warnings.warn(
                f"calibration yields {len(call)} values and the model takes {self.taken}: the rest is left out ({rest})",
                stacklevel=5,
            )
        return call[: self.taken]
