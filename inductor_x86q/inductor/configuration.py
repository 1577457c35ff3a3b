"""Inductor's options and modes, and the C++ compiler that they name."""

from __future__ import annotations

from typing import Any

import torch


def config_keys() -> set[str]:
    """The names of Inductor's options."""
    return set(torch._inductor.list_options())


def mode_options(mode: str) -> dict[str, Any]:
    """What a `torch.compile` mode stands for; raises RuntimeError that lists the modes when there is no such one."""
    return dict(torch._inductor.list_mode_options(mode))


def is_autotuning() -> bool:
    """Whether the compile at hand asks for max-autotune (relies on Inductor's configuration being patched by then)."""
    from torch._inductor import config

    return bool(config.max_autotune)


def keeps_constants() -> bool:
    """Whether the compile at hand leaves short constants the tensors they are, instead of writing their numbers out."""
    from torch._inductor import config

    return bool(config.always_keep_tensor_constants)


def threads(work: int, per_thread: int) -> int:
    """How many threads share so much work; 0 for as many as there are when it runs, where Inductor is told so."""
    from torch._inductor import config
    from torch._inductor.utils import parallel_num_threads

    if config.cpp.dynamic_threads:
        return 0 if work >= 2 * per_thread else 1
    return min(parallel_num_threads(), max(1, work // per_thread))


def foreign_pre_grad_pass() -> bool:
    """Whether some quantization library has set Inductor's pre-grad hook (torchao's x86 quantizer does on import)."""
    from torch._inductor import config

    hook = config.pre_grad_custom_pass
    return hook is not None and type(hook).__module__.startswith("torchao.")


def cxx_compiler() -> str:
    """The C++ compiler that Inductor will call; raises RuntimeError naming what was looked for when there is none.

    Relies on `cpp_builder.get_cpp_compiler` searching `config.cpp.cxx`.
    """
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
