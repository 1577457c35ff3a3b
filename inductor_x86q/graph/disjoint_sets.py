"""Sets that grow together: which set an item is in, each named by one of its items, its root."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class DisjointSets(Generic[Item]):
    """A disjoint-set forest. The root of a set is its least item by `order`; without one, of two the first one's."""

    def __init__(self, order: Callable[[Item], Any] | None = None) -> None:
        self._order = order
        self._parents: dict[Item, Item] = {}

    def root(self, item: Item) -> Item:
        """The root of the item's set; an item not seen before is a set of its own."""
        parents = self._parents
        root = item
        while (parent := parents.setdefault(root, root)) != root:
            root = parent
        while item != root:  # what was passed on the way is hung up next to the root
            parents[item], item = root, parents[item]
        return root

    def join(self, first: Item, second: Item) -> None:
        first, second = self.root(first), self.root(second)
        if self._order is not None:
            first, second = sorted((first, second), key=self._order)
        self._parents[second] = first

    def sets(self) -> dict[Item, list[Item]]:
        """The items of each set by its root."""
        found: dict[Item, list[Item]] = {}
        for item in self._parents:
            found.setdefault(self.root(item), []).append(item)
        return found
