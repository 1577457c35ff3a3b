"""What a kernel does to the value of an output before it stores it, and a layer's scales, zero points and bias."""

from __future__ import annotations

import dataclasses
import math

import torch

CPP_TYPES = {torch.uint8: "uint8_t", torch.int8: "int8_t", torch.float32: "float", torch.bfloat16: "Bfloat16"}
SHORT_NAMES = {torch.uint8: "u8", torch.int8: "s8", torch.float32: "f32", torch.bfloat16: "bf16"}

# Post-operations that only limit a value, which limits do to the quantized one as well; None: its scalars are the limits.
# They are one in machine code.
LIMITS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "hardtanh": None}
CLAMP = "clamp"
# What a kernel does to a vector `v` of floats, as C++; `first` and `second` are its scalars. Those with an exponential: of
# what, and the result with that one as `e`.
_CODE: dict[str, str | tuple[str, str]] = {
    CLAMP: "second < v ? Floats{} + second : first > v ? Floats{} + first : v",  # what is no number stays so
    "hardsigmoid": "minimum(maximum(v + 3.0f, Floats{}), Floats{} + 6.0f) * (1.0f / 6.0f)",
    "hardswish": "v * minimum(maximum(v + 3.0f, Floats{}), Floats{} + 6.0f) * (1.0f / 6.0f)",
    "leaky_relu": "maximum(v, Floats{}) + minimum(v, Floats{}) * first",
    "sigmoid": ("-v", "reciprocal(1.0f + e)"),
    "swish": ("-v", "v * reciprocal(1.0f + e)"),
    "tanh": ("v + v", "1.0f - 2.0f * reciprocal(e + 1.0f)"),
    "gelu_tanh": ("v * (-1.5957691f - 0.07135481f * (v * v))", "v * reciprocal(1.0f + e)"),
    # 1 - erf(|v| / sqrt(2)) is about e^(-v*v / 2) times a polynomial of 1 / (1 + p|v|): Abramowitz and Stegun, 7.1.26.
    "gelu_erf": ("-0.5f * v * v", "gelu(v, e)"),
}
# What kernels take as a post-operation, as oneDNN names it.
ACTIVATIONS = frozenset({*LIMITS, *_CODE} - {CLAMP})


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What happens to the float value of an output: an operand is added, an activation, quantization."""

    output_dtype: torch.dtype
    activation: str = "none"
    other_dtype: torch.dtype | None = None
    dynamic: bool = False  # the input's scale and zero point are arguments

    @property
    def code(self) -> str:
        """The activation as the machine code has it: limits are data."""
        return CLAMP if self.activation in LIMITS else self.activation

    @property
    def name(self) -> str:
        """What is added, the activation and the output's type."""
        dynamic = "dynamic_" if self.dynamic else ""
        added = f"add_{SHORT_NAMES[self.other_dtype]}_" if self.other_dtype is not None else ""
        return f"{dynamic}{added}{self.code}_{SHORT_NAMES[self.output_dtype]}"

    @property
    def in_steps(self) -> bool:
        """Whether scales and bias count in steps of the output, so that nothing is left to do but to limit and round."""
        return self.is_integer and self.activation in LIMITS

    @property
    def is_integer(self) -> bool:
        return not self.output_dtype.is_floating_point

    def limits(self, numbers: Numbers) -> tuple[int, int]:
        """The least and the greatest integer of the output."""
        if not self.is_integer:
            return 0, 0  # not used
        type_ = torch.iinfo(self.output_dtype)
        bounds = self._bounds(numbers) if self.in_steps else LIMITS["none"]
        steps = (torch.tensor(bounds) * numbers.steps).double() if numbers.steps else torch.zeros(2)
        low, high = (steps.round() + numbers.zero_point).clamp(type_.min, type_.max).int().tolist()
        return low, max(low, high)

    def scalars(self, numbers: Numbers) -> tuple[float, float]:
        """What C++ calls `first` and `second`."""
        first, second = (*(self._bounds(numbers) if self.code == CLAMP else numbers.activation), 0.0, 0.0)[:2]
        return first, second

    def _bounds(self, numbers: Numbers) -> tuple[float, ...]:
        return LIMITS[self.activation] or numbers.activation

    def source(self) -> str:
        return f"""\
struct Epilogue {{
    using Out = {CPP_TYPES[self.output_dtype]};
    using Other = {CPP_TYPES[self.other_dtype or torch.float32]};
    static constexpr bool HAS_OTHER = {flag(self.other_dtype is not None)}, IN_STEPS = {flag(self.in_steps)};
    static constexpr bool EXPONENTIAL = {flag(not isinstance(_CODE[self.code], str))}, DYNAMIC = {flag(self.dynamic)};
    template <int N>
    static X86Q_INLINE void activate(Floats (&values)[N], const Scalars& scalars) {{
        [[maybe_unused]] const float first = scalars.first, second = scalars.second;
{self._activation()}
    }}
}};
"""

    def _activation(self) -> str:
        written = _CODE[self.code]
        if isinstance(written, str):
            return f"        for (Floats& v : values) v = {written};"
        argument, result = written
        return f"""\
        Floats arguments[N];
        for (int i = 0; i < N; ++i) {{ const Floats v = values[i]; arguments[i] = {argument}; }}
        exponentials(arguments);
        for (int i = 0; i < N; ++i) {{ const Floats v = values[i], e = arguments[i]; values[i] = {result}; }}"""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Scales and zero points of a layer, and its bias."""

    x_scale: float
    x_zero_point: int
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    scale: float = 1.0
    zero_point: int = 0
    other_scale: float = 1.0
    other_zero_point: int = 0
    activation: tuple[float, ...] = ()

    @property
    def steps(self) -> float:
        """How many steps of the output 1.0 is, in single precision, as quantizing has it."""
        return float(torch.tensor(1 / self.scale))


def flag(value: bool) -> str:
    """A truth value in C++."""
    return str(value).lower()
