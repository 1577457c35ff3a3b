"""The source that Inductor generates is handed out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import SOURCE
from inductor_x86q.inductor.requirements import Needs


def _save(stock: Callable[[str], None], code: str) -> None:
    stock(code)
    save = SOURCE.value
    assert save is not None
    save(code)


PATCHES = (
    Patch(
        scope=SOURCE,
        module="torch._inductor.graph",
        attribute="GraphLowering.save_output_code",
        replacement=_save,
        kind=staticmethod,
        why="A hook that torch's own tests collect generated code by; it is one for all threads.",
        since="2.13",
        until="There is a hook of that kind per compile. None filed.",
        instead="Inductor's logs and `TORCH_COMPILE_DEBUG` write files, without saying which nodes a buffer stands for.",
        relies_on="It being called with the source while the graph's handler is active, and before anything of it is compiled.",
        needs=(
            Needs("torch._inductor.graph", "GraphLowering._compile_to_module_lines", looks_up=("save_output_code",)),
        ),
    ),
)


@contextlib.contextmanager
def source_goes_to(save: Callable[[str], None]) -> Iterator[None]:
    """Within this context `save` is called with each source that Inductor generates."""
    with SOURCE.entered(save, PATCHES):
        yield
