"""What max-autotune measured: in the debug log, and as one line of progress."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from inductor_x86q import progress
from inductor_x86q.inductor.requirements import Interface, Needs

log = logging.getLogger(__name__)

INTERFACE = Interface(
    "autotuning.py",
    "What max-autotune measured goes to the debug log and counts as progress.",
    (
        Needs("torch._inductor.select_algorithm", "add_feedback_saver"),
        Needs("torch._inductor.select_algorithm", "get_algorithm_selector_cache"),
    ),
    "Each choice's times being passed on in all threads, and `feedback_saver_fns` being where it keeps whom to call.",
)


@contextlib.contextmanager
def choices_followed(options: Mapping[str, Any]) -> Iterator[None]:
    """Within this context each choice that this thread makes under `options` counts as progress and goes into the log."""
    if not options.get("max_autotune"):
        yield
        return
    from torch._inductor import select_algorithm

    thread = threading.get_ident()
    with progress.task("choosing kernels") as advance:

        def follow(timings: Mapping[Any, float], name: str, *_: Any) -> None:
            if threading.get_ident() != thread:
                return
            advance()
            for choice, milliseconds in sorted(timings.items(), key=lambda item: item[1]):
                log.debug("%s: %s takes %.4f ms %s", name, choice.name, milliseconds, choice.description or "")

        select_algorithm.add_feedback_saver(follow)
        try:
            yield
        finally:
            savers = select_algorithm.get_algorithm_selector_cache().feedback_saver_fns
            if follow in savers:  # emptied where Inductor's caches are
                savers.remove(follow)
