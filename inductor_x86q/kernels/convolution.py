"""The C++ of one int8 convolution or linear: its compile-time shape, its epilogue, and its weights as it reads them."""

from __future__ import annotations

import dataclasses
import functools
import math
from importlib import resources

import torch
from torch.nn import functional

ALIGNMENT = 64  # of weights, in bytes: a vector that lies across two lines of the cache takes two loads
CPP_TYPES = {torch.uint8: "uint8_t", torch.int8: "int8_t", torch.float32: "float"}

# Convolutions take images of so few channels as they come, pixels or planes: their bytes are copied anyhow, and the copy takes
# planes in a fraction of the time in which Inductor turns them into pixels.
FEW_CHANNELS = 4

# What the kernels take as a post-operation, as C++ on a vector `v` of floats; `first` and `second` are its scalars. Those
# with an exponential: of what, and the result with that one as `e`.
ACTIVATIONS: dict[str, str | tuple[str, str]] = {
    "none": "v",
    "relu": "maximum(v, Floats{})",
    "hardtanh": "minimum(maximum(v, Floats{} + first), Floats{} + second)",
    "hardswish": "v * minimum(maximum(v + 3.0f, Floats{}), Floats{} + 6.0f) * (1.0f / 6.0f)",
    "leaky_relu": "maximum(v, Floats{}) + minimum(v, Floats{}) * first",
    "swish": ("-v", "v * reciprocal(1.0f + e)"),
    "tanh": ("v + v", "1.0f - 2.0f * reciprocal(e + 1.0f)"),
}
# Those that only limit a value, which limits do to the quantized one as well; None: its scalars are the limits.
LIMITS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "hardtanh": None}

# Rows by columns of the blocks of sums that the vector registers hold beside a vector of each column and one input, by the
# number of registers. More than four columns are not rounded to bytes together.
BLOCKS = {
    16: ((6, 2), (4, 3), (3, 4)),
    32: ((6, 4), (9, 3), (8, 3), (7, 3), (14, 2), (12, 2), (10, 2)),
}


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What happens to the float value of an output: an operand is added, an activation, quantization."""

    output_dtype: torch.dtype
    activation: str = "none"
    other_dtype: torch.dtype | None = None

    @property
    def in_steps(self) -> bool:
        """Whether scales and bias count in steps of the output, so that nothing is left to do but to limit and round."""
        return self.output_dtype != torch.float32 and self.activation in LIMITS

    def limits(self, numbers: Numbers) -> tuple[int, int]:
        """The least and the greatest integer of the output."""
        if self.output_dtype == torch.float32:
            return 0, 0  # not used
        type_ = torch.iinfo(self.output_dtype)
        bounds = (LIMITS[self.activation] or numbers.activation) if self.in_steps else LIMITS["none"]
        steps = (torch.tensor(bounds) * numbers.steps).double() if numbers.steps else torch.zeros(2)
        low, high = (steps.round() + numbers.zero_point).clamp(type_.min, type_.max).int().tolist()
        return low, max(low, high)

    def source(self) -> str:
        return f"""\
struct Epilogue {{
    using Out = {CPP_TYPES[self.output_dtype]};
    using Other = {CPP_TYPES[self.other_dtype or torch.float32]};
    static constexpr bool HAS_OTHER = {_flag(self.other_dtype is not None)}, IN_STEPS = {_flag(self.in_steps)};
    static constexpr bool EXPONENTIAL = {_flag(not isinstance(ACTIVATIONS[self.activation], str))};
    template <int N>
    static INDUCTOR_X86Q_INLINE void activate(Floats (&values)[N], const Scalars& scalars) {{
        [[maybe_unused]] const float first = scalars.first, second = scalars.second;
{self._activation()}
    }}
}};
"""

    def _activation(self) -> str:
        written = ACTIVATIONS[self.activation]
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


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A 2-d convolution of u8 (or a linear of s8 too, as one of 1×1 on its rows) with channels innermost.

    Strides are in elements. The input's channels may lie apart. Neither strides nor threads change how a weight is packed.
    """

    n: int
    h: int
    w: int
    c: int
    out_c: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    lanes: int  # 32-bit numbers of a vector, 8 or 16
    x_signed: bool
    fits_16: bool  # no sum of two products exceeds 16 bits
    x_strides: tuple[int, int, int] = (0, 0, 0)  # of an image, a row and a pixel
    x_channel: int = 1  # from one channel to the next
    other_pixel: int = 0
    out_pixel: int = 0  # 0: no gaps between the output's pixels
    threads: int = 1  # 0: as many as there are when it runs

    @property
    def out_h(self) -> int:
        return self._outputs(self.h, 0)

    @property
    def out_w(self) -> int:
        return self._outputs(self.w, 1)

    def _outputs(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    @property
    def output_sizes(self) -> tuple[int, int, int, int]:
        return self.n, self.out_h, self.out_w, self.out_c

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c == self.out_c and self.groups > 1

    @property
    def macs(self) -> int:
        return self.n * self.out_h * self.out_w * self.out_c * (self.c // self.groups) * math.prod(self.kernel)

    @property
    def copied(self) -> bool:
        """Whether the input is first copied: with its padding, or without gaps between channels and pixels."""
        gaps = self.x_channel != 1 or (self.kernel[1] > 1 and self.x_strides[2] != self.c)
        return not self.depthwise and (any(self.padding) or gaps)

    @property
    def strides(self) -> tuple[int, int, int]:
        """The strides of what the kernel reads, the copy where there is one."""
        if not self.copied:
            return self.x_strides
        width = self.w + 2 * self.padding[1]
        return (self.h + 2 * self.padding[0]) * width * self.c, width * self.c, self.c

    @property
    def runs(self) -> tuple[int, int, bool]:
        """How many runs of how many contiguous bytes an output reads, and whether a run is a whole row of the kernel."""
        rows, columns = self.kernel
        whole = self.groups == 1 and (columns == 1 or self.dilation[1] == 1)
        bytes_ = self.c // self.groups
        return (rows, columns * bytes_, True) if whole else (rows * columns, bytes_, False)

    @property
    def group_vectors(self) -> int:
        return math.ceil(self.out_c / self.groups / self.lanes)

    @property
    def channel_count(self) -> int:
        """How many channels the numbers of a layer are laid out for: vectors are filled up, a group at a time."""
        if self.depthwise:
            return math.ceil(self.c / (4 * self.lanes)) * 4 * self.lanes
        return self.group_vectors * self.groups * self.lanes

    def _depthwise_order(self) -> torch.Tensor:
        """The channels in the order in which a depthwise kernel takes them: in blocks of four vectors, the last of which
        begins earlier; a vector takes four channels of each 16, as instructions that interleave bytes give them."""
        lanes = self.lanes
        block = torch.arange(4 * lanes).reshape(-1, 4, 4).transpose(0, 1).flatten()
        starts = torch.arange(0, self.c, 4 * lanes).clamp(max=max(self.c - 4 * lanes, 0))
        return (starts[:, None] + block).flatten().clamp(max=self.c - 1)

    def constants(self, weight: torch.Tensor, numbers: Numbers, epilogue: Epilogue) -> torch.Tensor:
        """All that a kernel reads besides images, as int8: the numbers, and the packed weight.

        One tensor, because each costs at every call of the compiled code.
        """
        numbers_bytes = self.channels(weight, numbers, epilogue).view(torch.int8)
        filled_up = functional.pad(numbers_bytes, (0, -len(numbers_bytes) % ALIGNMENT))
        return torch.cat([filled_up, self.pack(weight)])

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The int8 weight (out, in/groups, kh, kw) in the order in which the kernel reads it, one-dimensional."""
        if self.depthwise:
            taps = weight[self._depthwise_order(), 0].unflatten(0, (-1, 4 * self.lanes))  # block, channel, kh, kw
            taps = functional.pad(taps, (0, 0, 0, -taps.shape[2] % 4)).unflatten(2, (-1, 4))
            return taps.permute(0, 4, 2, 1, 3).contiguous().flatten()  # block, kw, four, channel, 4
        runs, size, _ = self.runs
        grouped = weight.permute(0, 2, 3, 1).reshape(self.groups, -1, runs, size)
        grouped = functional.pad(grouped, (0, -size % 4, 0, 0, 0, -grouped.shape[1] % self.lanes))
        vectors = grouped.unflatten(1, (-1, self.lanes)).unflatten(-1, (-1, 4))  # group, vector, lane, run, four, 4
        packed = vectors.permute(0, 1, 3, 4, 2, 5).contiguous()
        return torch.cat([packed.flatten(), self._overflows(packed).flatten()]) if self.pairs else packed.flatten()

    @property
    def pairs(self) -> int:
        """How many pairs of four bytes of a run the kernel may add in 16 bits, before it widens them."""
        return self.runs[1] // 8 if self.fits_16 and not self.depthwise else 0

    def _overflows(self, packed: torch.Tensor) -> torch.Tensor:
        """Whether four products may exceed 16 bits somewhere in a vector: for each group, vector, run and pair of fours.

        Two never do, as FITS_16 says, and the largest input is not more than what follows from that.
        """
        lowest, highest = map(int, torch.aminmax(packed))
        largest_input = min(255, 32767 // (2 * max(-lowest, highest, 1)))
        whole = packed[:, :, :, : 2 * self.pairs]
        pairs = whole.unflatten(3, (-1, 2)).unflatten(-1, (2, 2))  # group, vector, run, pair, four, lane, half, 2
        sums = torch.stack([pairs.clamp(min=0).sum((4, 7)), -pairs.clamp(max=0).sum((4, 7))])
        return (sums.amax((0, -2, -1)) > 32767 // largest_input).to(torch.int8)

    def channels(self, weight: torch.Tensor, numbers: Numbers, epilogue: Epilogue) -> torch.Tensor:
        """All of a layer's numbers as int32, bit for bit as `Scalars` in the C++ and what is said there."""
        zero_point = numbers.x_zero_point + (128 if self.x_signed else 0)
        compensation = -zero_point * weight.flatten(1).sum(1, dtype=torch.int32)
        steps = numbers.steps if epilogue.in_steps else 1.0
        scale = (numbers.weight_scale.double() * numbers.x_scale * steps).expand(self.out_c)
        bias = torch.zeros(self.out_c) if numbers.bias is None else numbers.bias.double() * steps
        rows = torch.stack([compensation.int(), *(_bits(values) for values in (scale, bias))])
        if self.depthwise:
            rows = rows[:, self._depthwise_order()]
        else:
            rows = rows.unflatten(1, (self.groups, -1))
            rows = functional.pad(rows, (0, -rows.shape[-1] % self.lanes)).flatten(1)
        activation = [*numbers.activation, 0.0, 0.0][:2]
        floats = torch.tensor([numbers.other_scale * steps, numbers.other_zero_point, *activation])
        integers = [torch.tensor(values, dtype=torch.int32) for values in (
            (numbers.zero_point, *epilogue.limits(numbers)), (numbers.x_zero_point,)
        )]  # fmt: skip
        tail = [_bits(torch.tensor([numbers.steps])), integers[0], _bits(floats), integers[1]]
        return torch.cat([rows.flatten(), *tail])

    def largest_step(self, weight: torch.Tensor, numbers: Numbers) -> float:
        """How many steps of the output a result can be, whatever the bytes that are read, before it is limited."""
        sums = 255 * weight.flatten(1).short().abs().sum(1)
        largest = (sums * numbers.weight_scale.double() * numbers.x_scale).max() + 255 * numbers.other_scale
        bias = 0.0 if numbers.bias is None else numbers.bias.abs().max()
        return float(largest + bias) * numbers.steps

    def source(self, rows: int, columns: int) -> str:
        """The struct of constants, for blocks of `rows` pixels by `columns` vectors (depthwise: `columns` pixels)."""
        image, row, pixel = self.strides
        runs, run, whole = self.runs
        offset = (
            f"run * {self.dilation[0] * row}"
            if whole
            else f"run / {self.kernel[1]} * {self.dilation[0] * row} + run % {self.kernel[1]} * {self.dilation[1] * pixel}"
        )
        return f"""\
struct Shape {{
    static constexpr int64_t N = {self.n}, H = {self.h}, W = {self.w}, C = {self.c}, GROUPS = {self.groups};
    static constexpr int64_t OUT_C = {self.out_c}, OUT_H = {self.out_h}, OUT_W = {self.out_w};
    static constexpr int KERNEL_H = {self.kernel[0]}, KERNEL_W = {self.kernel[1]};
    static constexpr int STRIDE_H = {self.stride[0]}, STRIDE_W = {self.stride[1]};
    static constexpr int DILATION_H = {self.dilation[0]}, DILATION_W = {self.dilation[1]};
    static constexpr int64_t PAD_H = {self.padding[0]}, PAD_W = {self.padding[1]};
    static constexpr int64_t PADDED_HEIGHT = {self.h + 2 * self.padding[0]}, PADDED_WIDTH = {self.w + 2 * self.padding[1]};
    static constexpr int64_t X_IMAGE = {self.x_strides[0]}, X_ROW = {self.x_strides[1]}, X_PIXEL = {self.x_strides[2]};
    static constexpr int64_t X_CHANNEL = {self.x_channel};
    static constexpr int64_t IMAGE = {image}, ROW = {row}, PIXEL = {pixel};
    static constexpr int64_t OTHER_PIXEL = {self.other_pixel}, OUT_PIXEL = {self.out_pixel or self.out_c};
    static constexpr int RUNS = {runs}, RUN = {run}, VECTORS = {self.group_vectors * self.groups};
    static constexpr int PAIRS = {self.pairs};  // of a run
    static constexpr int ROWS = {rows}, COLUMNS = {columns}, THREADS = {self.threads}, CHANNELS = {self.channel_count};
    static constexpr bool COPIED = {_flag(self.copied)}, SIGNED = {_flag(self.x_signed)}, FITS_16 = {_flag(self.fits_16)};
    static constexpr int64_t run(int run) {{ return {offset}; }}
}};
"""

    @property
    def function(self) -> str:
        return "depthwise" if self.depthwise else "convolution"

    def blockings(self, registers: int) -> list[tuple[int, int]]:
        """Rows and columns of the register blocks worth trying on a CPU of so many registers, the best guess first."""
        if self.depthwise:
            columns = 2 if registers == 16 else 4  # of four vectors each, which is half of the registers
            return [(1, min(columns, self.out_w))]
        vectors, pixels = self.group_vectors, self.n * self.out_h * self.out_w

        def cost(block: tuple[int, int]) -> float:
            """Products, and a load for each row and column; the last blocks overlap those before them."""
            rows, columns = block
            return math.ceil(pixels / rows) * math.ceil(vectors / columns) * (rows * columns + (rows + columns) / 2)

        best: dict[int, tuple[int, int]] = {}  # of each number of columns
        for rows, columns in BLOCKS[registers]:
            block = min(rows, pixels), min(columns, vectors)
            best[block[1]] = min(best.get(block[1], block), block, key=cost)
        return sorted(best.values(), key=cost)[:2]


@functools.cache
def header(lanes: int) -> str:
    """The C++ that all kernels of a vector width share; it is guarded, so that a file may hold it more than once."""
    text = resources.files(__package__).joinpath("int8.h").read_text()
    guard = f"INDUCTOR_X86Q_INT8_{lanes}"
    return f"#ifndef {guard}\n#define {guard}\n#undef INDUCTOR_X86Q_LANES\n#define INDUCTOR_X86Q_LANES {lanes}\n{text}#endif\n"


def namespace(lanes: int) -> str:
    """Where the C++ of that vector width is."""
    return f"inductor_x86q::lanes_{lanes}"


def _flag(value: bool) -> str:
    return str(value).lower()


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of numbers in single precision; what exceeds it becomes its largest number, so that 0 times it is 0."""
    largest = torch.finfo(torch.float32).max
    return values.float().clamp(-largest, largest).contiguous().view(torch.int32)
