"""What differs between two reports of one model, layer by layer: before and after an exclude, or two versions of torch.

Layers are matched by their path, several of one path in their order.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from inductor_x86q.report.model import Content, Fusion, Miss
from inductor_x86q.report.text import short_kernel, short_types


@dataclasses.dataclass(frozen=True)
class Change:
    """A layer in both reports; None where one of them has no such layer."""

    before: Fusion | Miss | None
    after: Fusion | Miss | None

    @property
    def kind(self) -> str:
        """gained (int8 now), lost (int8 before), changed (another kernel or reason), new, gone, same."""
        if self.before is None:
            return "new"
        if self.after is None:
            return "gone"
        was_int8, is_int8 = isinstance(self.before, Fusion), isinstance(self.after, Fusion)
        if was_int8 != is_int8:
            return "gained" if is_int8 else "lost"
        return "same" if described(self.before) == described(self.after) else "changed"


def changes(before: Content, after: Content) -> list[Change]:
    """Every layer of either report: those of `after` in its order, then those that only `before` has."""
    old = dict(_numbered(before))
    found = [Change(old.pop(key, None), layer) for key, layer in _numbered(after)]
    return found + [Change(layer, None) for layer in old.values()]


def described(layer: Fusion | Miss) -> str:
    """What a layer is computed by, without its numbers."""
    if isinstance(layer, Fusion):
        return f"{short_kernel(layer)}, {short_types(layer)}"
    return f"{layer.operator} in float: {layer.obstacle}"


def _numbered(report: Content) -> Iterator[tuple[tuple[str, int], Fusion | Miss]]:
    """The layers in the graph's order, by their path and how many of that path come before."""
    place = {node.name: position for position, node in enumerate(report.nodes)}
    layers: list[Fusion | Miss] = [*report.fused, *report.missed, *report.kept_float]
    layers.sort(key=lambda layer: place.get(layer.node, len(place)))
    seen: Counter[str] = Counter()
    for layer in layers:
        yield (layer.layer, seen[layer.layer]), layer
        seen[layer.layer] += 1
