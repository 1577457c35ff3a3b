"""Inductor's options and modes, and the C++ compiler that they name."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "configuration.py",
    "Inductor's options and modes, and the C++ compiler that they name.",
    (
        Needs("torch._inductor", "list_options"),
        Needs("torch._inductor", "list_mode_options", parameters=("mode",)),
        Needs("torch._inductor.config", "freezing"),
        Needs("torch._inductor.config", "cpp_wrapper"),
        Needs("torch._inductor.config", "cpp_wrapper_build_separate"),
        Needs("torch._inductor.config", "always_keep_tensor_constants"),
        Needs("torch._inductor.config", "max_autotune"),
        Needs("torch._inductor.config", "pre_grad_custom_pass"),
        Needs("torch._inductor.config", "cpp.cxx"),
        Needs("torch._inductor.cpp_builder", "get_cpp_compiler"),
    ),
    "Options being patched when the passes run, in the thread that compiles; `get_cpp_compiler` searching `cpp.cxx`.",
)


def config_keys() -> set[str]:
    """The names of Inductor's options."""
    return set(torch._inductor.list_options())


# What is asked of Inductor where the user says nothing else.
DEFAULTS = {
    "freezing": True,
    "cpp_wrapper": True,
    # The function that calls the kernels is compiled by itself, hardly optimised: else it takes longer than they do.
    "cpp_wrapper_build_separate": True,
    # Inductor writes out vectors of up to 8 numbers in a kernel of their own, at each call: scales and biases stay data.
    "always_keep_tensor_constants": True,
    # It prints a table for every choice on standard error otherwise; `autotuning` has the times in the debug log.
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}


def merged(mode: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a compile for which the user gives these, and perhaps a `torch.compile` mode.

    Raises RuntimeError where there is no such mode, with those that there are, and where freezing is switched off.
    """
    if not given.get("freezing", True):
        raise RuntimeError("option `freezing` is False: the int8 passes run on frozen weights only; leave it out")
    chosen = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    chosen.pop("triton.cudagraphs", None)  # for a CPU it stands for a warning only
    foreign = {"pre_grad_custom_pass": None} if _foreign_pre_grad_pass() else {}
    return {**DEFAULTS, **chosen, **foreign, **given}


def _foreign_pre_grad_pass() -> bool:
    """Whether some quantization library has set Inductor's pre-grad hook (torchao's x86 quantizer does on import)."""
    from torch._inductor import config

    hook = config.pre_grad_custom_pass
    return hook is not None and type(hook).__module__.startswith("torchao.")


def frozen() -> contextlib.AbstractContextManager[Any]:
    """Within this context a plain torch.compile freezes and calls kernels from C++, as ours do; Dynamo reads the flag too."""
    from torch._inductor import config

    return config.patch(freezing=True, cpp_wrapper=True)


def is_autotuning() -> bool:
    """Whether the compile at hand asks for max-autotune."""
    from torch._inductor import config

    return bool(config.max_autotune)


def keeps_constants() -> bool:
    """Whether the compile at hand leaves short constants the tensors they are, instead of writing their numbers out."""
    from torch._inductor import config

    return bool(config.always_keep_tensor_constants)


# Of a layer, a thread more pays where it saves more than waking it costs, which is about this many multiply-accumulates.
MACS_PER_THREAD = 100_000


def threads(work: int, per_thread: int) -> int:
    """How many threads share so much work; 0 for as many as there are when it runs, where Inductor is told so."""
    from torch._inductor import config
    from torch._inductor.utils import parallel_num_threads

    if config.cpp.dynamic_threads:
        return 0 if work >= 2 * per_thread else 1
    return min(parallel_num_threads(), max(1, work // per_thread))


def threads_cpp(work: str, per_thread: int) -> str:
    """The same as C++, of so much work as C++."""
    from torch._inductor import config
    from torch._inductor.utils import parallel_num_threads

    share, most = f"({work}) / {per_thread}", parallel_num_threads()
    if config.cpp.dynamic_threads:
        return f"({share} >= 2 ? 0 : 1)"
    return f"({share} < 2 ? 1 : {share} < {most} ? {share} : {most})"


def cxx_compiler() -> str:
    """The C++ compiler that Inductor will call; raises RuntimeError naming what was looked for when there is none."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception as error:
        searched = ", ".join(str(c) for c in config.cpp.cxx if c) or "g++"
        raise RuntimeError(
            f"no C++ compiler found (looked for {searched}): Inductor compiles its kernels with it. "
            "Install one (Debian and Ubuntu: apt-get install g++) or set the environment variable CXX to its path."
        ) from error
