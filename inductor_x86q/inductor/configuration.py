"""Inductor's options and modes, and the C++ compiler that they name."""

from __future__ import annotations

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


def mode_options(mode: str) -> dict[str, Any]:
    """What a `torch.compile` mode stands for; raises RuntimeError that lists the modes when there is no such one."""
    return dict(torch._inductor.list_mode_options(mode))


def is_autotuning() -> bool:
    """Whether the compile at hand asks for max-autotune."""
    from torch._inductor import config

    return bool(config.max_autotune)


def keeps_constants() -> bool:
    """Whether the compile at hand leaves short constants the tensors they are, instead of writing their numbers out."""
    from torch._inductor import config

    return bool(config.always_keep_tensor_constants)


def foreign_pre_grad_pass() -> bool:
    """Whether some quantization library has set Inductor's pre-grad hook (torchao's x86 quantizer does on import)."""
    from torch._inductor import config

    hook = config.pre_grad_custom_pass
    return hook is not None and type(hook).__module__.startswith("torchao.")


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
