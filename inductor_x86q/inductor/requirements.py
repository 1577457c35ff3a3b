"""What of torch's private interface is relied on, as data that can be checked and listed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Needs:
    """Something that torch has to have.

    Attributes:
        module: where it is.
        attribute: what it is called there, "Class.method" for a method; "" for the module itself.
        parameters: names that it has to take arguments by.
        looks_up: names that its code has to use: what is replaced is of no use where nobody asks for it.
    """

    module: str
    attribute: str = ""
    parameters: tuple[str, ...] = ()
    looks_up: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What of it this torch does not have; None where all of it is there."""
        try:
            found: Any = importlib.import_module(self.module)
        except ImportError:
            return f"there is no module {self.module}"
        for name in filter(None, self.attribute.split(".")):
            if not hasattr(found, name):
                return f"{self.module} has no {self.attribute}"
            found = getattr(found, name)
        found = inspect.unwrap(found) if callable(found) else found
        if self.parameters and (lost := set(self.parameters) - set(inspect.signature(found).parameters)):
            return f"{self.module}.{self.attribute} takes no {_listed(lost)}"
        if self.looks_up and (lost := set(self.looks_up) - set(_names(found.__code__))):
            return f"{self.module}.{self.attribute} does not use {_listed(lost)}"
        return None

    def __str__(self) -> str:
        text = f"{self.module}.{self.attribute}".rstrip(".")
        text += f"({', '.join(self.parameters)})" if self.parameters else ""
        return text + (f", which uses {_listed(self.looks_up)}" if self.looks_up else "")


@dataclasses.dataclass(frozen=True)
class Interface:
    """A private interface of torch that is used as it is, with nothing replaced.

    Attributes:
        name: the file that reaches it, within this folder.
        why: what it is used for.
        needs: what torch has to have; `relies_on` says what else holds that cannot be looked up.
    """

    name: str
    why: str
    needs: tuple[Needs, ...]
    relies_on: str = ""


def _names(code: CodeType) -> Iterator[str]:
    """The global names and attributes that code uses, that of functions in it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
