"""int8 convolutions are known to give channels innermost, whatever the batch size is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs


def _is_contiguous(stock: Callable[..., bool], x: Any) -> bool:
    return x.get_dtype() not in (torch.uint8, torch.int8) and stock(x)


PATCHES = (
    Patch(
        scope=COMPILE,
        module="torch._inductor.mkldnn_ir",
        attribute="is_contiguous_storage_and_layout",
        replacement=_is_contiguous,
        why="Inductor says that a convolution of a size not known when compiling gives its result contiguous where the input "
        "is both contiguous and channels-last (one channel, or one pixel). int8 convolutions never do, and the generated "
        "code stops at the result's strides.",
        since="2.13",
        until="pytorch/pytorch#121400, which made the rule for float convolutions, leaves out those whose weight is packed "
        "all the same. None filed.",
        instead="There is none.",
        relies_on="`_prepare_convolution_fusion_create` asking this function for that only.",
        needs=(
            Needs(
                "torch._inductor.mkldnn_ir",
                "_prepare_convolution_fusion_create",
                looks_up=("is_contiguous_storage_and_layout",),
            ),
        ),
    ),
)
