"""What max-autotune measured: in the debug log, and as one line of progress."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from inductor_x86q import progress

log = logging.getLogger(__name__)

# Inductor prints a table for every choice on standard error otherwise.
QUIET = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}


@contextlib.contextmanager
def choices_followed(options: Mapping[str, Any]) -> Iterator[None]:
    """Within this context each choice that this thread makes under `options` counts as progress and goes into the log.

    Relies on `select_algorithm.add_feedback_saver` having each choice's times passed on, in all threads, and on
    `feedback_saver_fns` being the list where it keeps whom to call.
    """
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
