"""What a patch is: something else in the place of an attribute of torch, for those compiles that ask for it alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from inductor_x86q.inductor.requirements import Needs

T = TypeVar("T")


class Scope(Generic[T]):
    """Where patches are in force: in the context that entered it, and in those that are copied from that one.

    A thread that nobody gave a copy of the context to, as that of another compile, is not in the scope. The value is
    what the patches in force work with.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._value: ContextVar[T | None] = ContextVar(f"inductor_x86q.{name}", default=None)

    @property
    def value(self) -> T | None:
        """What the scope was entered with; None outside of it."""
        return self._value.get()

    @contextlib.contextmanager
    def entered(self, value: T, patches: Iterable[Patch]) -> Iterator[None]:
        """Within this context `patches` are in force. They are in place as long as any thread is in the scope.

        They are taken away after the last one, though they do nothing outside of the scope: so nothing of ours is left in
        torch between compiles, and what somebody else replaces then is what we build on the next time.
        """
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch.in_place())
            token = self._value.set(value)
            stack.callback(self._value.reset, token)
            yield


@dataclasses.dataclass(eq=False)
class Patch:
    """Something in the place of an attribute of a module or class of torch.

    What stands there asks whether the running code is in the patch's scope: if so it calls `replacement` with torch's
    own implementation in front of the arguments, if not torch's own alone.

    Attributes:
        scope: where it is in force.
        module: torch's module.
        attribute: the name there; "Class.method" for a method.
        replacement: what is called instead.
        why: what is wrong or too slow in torch's own.
        since: the first torch that it is needed for.
        until: when it can go: the issue or pull request upstream, or that there is none.
        instead: torch's sanctioned way, and why it is not taken.
        relies_on: what has to hold, in words.
        needs: what torch has to have beside the attribute itself, which can be looked up.
        static: whether it is a static method.
    """

    scope: Scope[Any]
    module: str
    attribute: str
    replacement: Callable[..., Any]
    why: str
    since: str
    until: str
    instead: str
    relies_on: str
    needs: tuple[Needs, ...] = ()
    static: bool = False
    _uses: int = dataclasses.field(default=0, init=False)
    _stock: Any = dataclasses.field(default=None, init=False)
    _stands_in: Any = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        def stand_in(*arguments: Any, **keywords: Any) -> Any:
            stock = self._stock or _nothing
            if self.scope.value is None:
                return stock(*arguments, **keywords)
            return self.replacement(stock, *arguments, **keywords)

        self._stands_in = staticmethod(stand_in) if self.static else stand_in

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the patch is where it belongs, for whoever else has entered it too.

        Whoever replaces the attribute meanwhile, and puts back ours when we are gone, leaves behind what calls torch's own.
        """
        owner, name = self._owner()
        with _lock:
            self._uses += 1
            if self._uses == 1 and vars(owner)[name] is not self._stands_in:
                self._stock = vars(owner)[name]
                if callable(self._stock):
                    functools.update_wrapper(getattr(self._stands_in, "__func__", self._stands_in), self._stock)
                setattr(owner, name, self._stands_in)
        try:
            yield
        finally:
            with _lock:
                self._uses -= 1
                if not self._uses and vars(owner)[name] is self._stands_in:
                    setattr(owner, name, self._stock)

    def _owner(self) -> tuple[Any, str]:
        *path, name = self.attribute.split(".")
        return functools.reduce(getattr, path, importlib.import_module(self.module)), name

    def all_needs(self) -> tuple[Needs, ...]:
        """What torch has to have, the attribute itself included."""
        return (Needs(self.module, self.attribute), *self.needs)


_lock = threading.Lock()


def _nothing(*arguments: Any, **keywords: Any) -> None:
    """What stands for an attribute that is None: a hook that nobody has set."""
