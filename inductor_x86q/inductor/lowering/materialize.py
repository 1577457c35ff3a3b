"""What Inductor makes of `inductor_x86q::materialize`: a buffer, where it would compute the tensor anew at each place it is read.

Relies on `TensorBox.realize` giving a tensor a buffer, and on the scheduler fusing loops only of the same sizes.
"""

from __future__ import annotations

from typing import Any

from torch._inductor.lowering import register_lowering

from inductor_x86q.graph.library import MATERIALIZE


def _materialize(x: Any) -> Any:
    x.realize()
    return x


register_lowering(MATERIALIZE, type_promotion_kind=None)(_materialize)
