"""Why something is not done: of a layer that stays float, an `Obstacle`; of a rule that does not match, a `No`."""

from __future__ import annotations

import dataclasses
import enum

from torch import fx


class Reason(enum.Enum):
    """Why a layer does not run in int8; the value says what to change."""

    NOT_QUANTIZED = (
        "no quantize/dequantize stands at its inputs: if it should be int8, take it out of `exclude`, or annotate it "
        "in your quantizer"
    )
    NO_KERNEL = "torch has no int8 kernel for it: it stays float, and nothing needs to be changed"
    ACTIVATION_NOT_QUANTIZED = "its weight is quantized, its input is not: put quantize and dequantize in front of it"
    WEIGHT_NOT_QUANTIZED = "its input is quantized, its weight is not: quantize the weight to int8 per channel"
    WEIGHT_NOT_CONSTANT = "its weight is not known when compiling: pass it as a parameter or buffer, not as an input"
    WEIGHT_TYPE = "its weight is not symmetric int8 with one scale a tensor or output channel: quantize it so"
    ACTIVATION_TYPE = "its input is not uint8 or int8 with one scale for the tensor: quantize it so"
    BAD_PARAMETERS = "a scale or zero point is not usable: calibrate again, with data that reaches this layer"
    IN_A_REGION = (
        "it runs inside a higher-order operator that gets its weight as an argument at each run, where nothing is fused: use "
        "`torch.cond` or `while_loop`, each graph in one of them only, or move the layer out"
    )
    SATURATES = (
        "this CPU has no VNNI and adds pairs of 8-bit products in 16 bits, which can overflow: quantize with "
        "reduce_range=True on this machine"
    )


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """A reason, and what was found in this case."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value}{f' ({self.detail})' if self.detail else ''}"


# What is float for one of these reasons is so by design; for any other, it should have been int8.
BY_DESIGN = frozenset({Reason.NOT_QUANTIZED, Reason.NO_KERNEL})


@dataclasses.dataclass(frozen=True)
class No:
    """Why a rule does not match, and which nodes stood in the way, as far as it knows; false in a condition."""

    why: str
    nodes: tuple[fx.Node, ...] = ()

    def __bool__(self) -> bool:
        return False
