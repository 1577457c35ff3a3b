"""What a patch is: something else in the place of an attribute of torch, for those compiles that ask for it alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import threading
import weakref
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
        since: the first supported torch that needs it.
        until: when it can go: the issue or pull request upstream, or that there is none.
        instead: torch's sanctioned way, and why it is not taken.
        relies_on: what has to hold, in words.
        needs: what torch has to have beside the attribute itself, which can be looked up.
        kind: `staticmethod` or `classmethod`, where it is one.
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
    kind: Callable[..., Any] | None = None
    _uses: int = dataclasses.field(default=0, init=False)
    _in_place: Callable[..., Any] | None = dataclasses.field(default=None, init=False)
    # Of what stood in place before and is still known to somebody: torch's own, or what that somebody had put there.
    _gone: weakref.WeakKeyDictionary[Callable[..., Any], Any] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary, init=False
    )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the patch is where it belongs, for whoever else has entered it too.

        Somebody else may replace the attribute meanwhile, and keep what they found there or put it back when we are gone:
        from then on it calls torch's own alone.
        """
        owner, name = self._owner()
        with _lock:
            self._uses += 1
            if self._uses == 1:
                stored = vars(owner)[name]
                stock = self._gone.get(_function(stored), stored) if stored is not None else None
                self._in_place = stand_in = self._stand_in(stock)
                self._gone[stand_in] = stock
                setattr(owner, name, self.kind(stand_in) if self.kind else stand_in)
        try:
            yield
        finally:
            with _lock:
                self._uses -= 1
                if not self._uses:
                    assert self._in_place is not None
                    if _function(vars(owner)[name]) is self._in_place:
                        setattr(owner, name, self._gone[self._in_place])
                    self._in_place = None

    def _stand_in(self, stock: Any) -> Callable[..., Any]:
        """What stands where `stock` stood."""
        call = _function(stock) or _nothing

        @functools.wraps(call)
        def stand_in(*arguments: Any, **keywords: Any) -> Any:
            if self.scope.value is None or self._in_place is not stand_in:
                return call(*arguments, **keywords)
            return self.replacement(call, *arguments, **keywords)

        return stand_in

    def _owner(self) -> tuple[Any, str]:
        *path, name = self.attribute.split(".")
        return functools.reduce(getattr, path, importlib.import_module(self.module)), name

    def all_needs(self) -> tuple[Needs, ...]:
        """What torch has to have, the attribute itself included."""
        return (Needs(self.module, self.attribute), *self.needs)


_lock = threading.Lock()


def _function(stored: Any) -> Any:
    """The function of a static or class method, as it is stored in a class."""
    return getattr(stored, "__func__", stored)


def _nothing(*arguments: Any, **keywords: Any) -> None:
    """What stands for an attribute that is None: a hook that nobody has set."""
