"""The arguments of one call of a model: positional ones and those by name, tensors and whatever holds tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree


def checked(example_inputs: Any, kwargs: Any, error: type[Exception]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a caller gave for one call, `kwargs` as a dictionary of its own; raises `error` where it is none."""
    if not isinstance(example_inputs, tuple):
        raise error(
            f"example_inputs is a {type(example_inputs).__name__}: expected a tuple of positional arguments, e.g. "
            "(torch.randn(1, 3, 224, 224),); arguments by name go into kwargs, beside ()"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise error(
            f"kwargs is a {type(kwargs).__name__}: expected a dictionary, e.g. {{'input_ids': ..., 'attention_mask': ...}}"
        )
    return example_inputs, dict(kwargs or {})


def split(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call as data loaders give it: a dictionary of arguments by name, a tuple or list of positional ones, or one."""
    if isinstance(call, Mapping):
        return (), dict(call)
    return (tuple(call) if isinstance(call, (tuple, list)) else (call,)), {}


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the function's own names, in their order; raises TypeError with all names that do not fit."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    any_name = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    unknown = [name for name in kwargs if name not in signature.parameters]
    if unknown and not any_name:
        raise TypeError(f"it takes no argument named {_listed(unknown)}: it takes {_listed([*signature.parameters])}")
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError:
        missing = [p.name for p in list(parameters)[len(args) :] if p.name not in kwargs and p.default is p.empty
                   and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
        if not missing:
            raise
        raise TypeError(f"it takes {_listed([*signature.parameters])}, and was not given {_listed(missing)}") from None


def positional(graph_module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of an exported graph in its order, which takes each of them by position too."""
    return tuple(bind(graph_module.forward, args, kwargs).values()) if kwargs else args


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


# --- the batch --------------------------------------------------------------------------------------------------------


def batch_size(arguments: Any) -> int | None:
    """The size of the first dimension of all tensors among the arguments; None where they have none in common."""
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    if not tensors or not all(x.dim() for x in tensors):
        return None
    sizes = {x.shape[0] for x in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def size(arguments: Any) -> int:
    """How many values all tensors among the arguments hold."""
    return sum(x.numel() for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor))


def each_tensor(function: Callable[[torch.Tensor], Any], arguments: Any) -> Any:
    """The arguments with what the function makes of each tensor in its place."""
    return pytree.tree_map_only(torch.Tensor, function, arguments)


def described(arguments: Any) -> str:
    """The shapes of the tensors among positional or named arguments, and the types of the others."""

    def one(x: Any) -> str:
        return str(tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__

    if isinstance(arguments, Mapping):
        return ", ".join(f"{name}: {one(x)}" for name, x in arguments.items())
    return ", ".join(map(one, arguments))
