"""Inductor's graph cache takes graphs with packed weights, and tells weights by their contents."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from typing import Any

import torch

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs


def _reduce_tensor(stock: Callable[..., Any], pickler: Any, tensor: torch.Tensor) -> Any:
    from torch._inductor.freezing_utils import is_frozen_param

    if tensor.is_mkldnn:
        # Its layout is left out: the kernels take any, and the bytes that describe it hold some never written.
        return _identity, ((tuple(tensor.shape), str(tensor.dtype), _digest(tensor)),)
    part = stock(pickler, tensor)
    return (_identity, ((part, _digest(tensor)),)) if is_frozen_param(tensor) else part


def _check_tensor(stock: Callable[..., None], tensor: torch.Tensor) -> None:
    """Takes any tensor."""


def _identity(value: Any) -> Any:
    return value


def _digest(tensor: torch.Tensor) -> bytes:
    """A hash of a CPU tensor's bytes, packed or strided."""
    if tensor.is_mkldnn:
        address, size = torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    else:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
    contents = (ctypes.c_ubyte * size).from_address(address) if size else b""
    return hashlib.blake2b(contents, digest_size=20).digest()


_MODULE = "torch._inductor.codecache"

PATCHES = (
    Patch(
        scope=COMPILE,
        module=_MODULE,
        attribute="FxGraphCachePickler._reduce_tensor",
        replacement=_reduce_tensor,
        why="Of frozen weights Inductor puts shape and type into the key of its graph cache (pytorch/pytorch#136505); what a "
        "lowering derived from their values would then come from another model. Packed weights it does not take at all, "
        "though it needs them in the key only: a hit takes constants from the graph at hand.",
        since="2.13",
        until="Inductor hashes frozen weights, and packed ones. The same fault in its own lowerings is open as "
        "pytorch/pytorch#143144.",
        instead="A `uuid`, as custom passes have, is part of the key, but is asked for before there is a graph to hash.",
        relies_on="This method making the key's part for a constant; freezing marking what it made.",
        needs=(
            Needs(_MODULE, "FxGraphCachePickler.__init__", looks_up=("_reduce_tensor",)),
            Needs("torch._inductor.freezing_utils", "is_frozen_param"),
        ),
    ),
    Patch(
        scope=COMPILE,
        module=_MODULE,
        attribute="CacheabilityValidator.check_tensor",
        replacement=_check_tensor,
        kind=staticmethod,
        why="Inductor bypasses its graph cache for graphs with packed weights, since these cannot be pickled.",
        since="2.13",
        until="Packed weights can be pickled, as a remark in Inductor's source says (pytorch/pytorch#117888). None filed.",
        instead="There is none.",
        relies_on="This method refusing mkldnn tensors and nothing else.",
        needs=(
            Needs(_MODULE, "CacheabilityValidator.check_tensor", looks_up=("is_mkldnn",)),
            Needs(_MODULE, "CacheabilityValidator._check_cache_key_object", looks_up=("check_tensor",)),
        ),
    ),
)
