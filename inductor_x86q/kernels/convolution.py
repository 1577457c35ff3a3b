"""One int8 convolution or linear: its sizes and strides, and its weight and numbers as kernels read them."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional

from inductor_x86q.kernels.epilogue import Epilogue, Numbers

ALIGNMENT = 64  # of weights, in bytes: a vector that lies across two lines of the cache takes two loads
SCALARS = 9  # of 32 bits, as `Scalars` in the C++
# Of depthwise.h: the most rows of a window, and columns of the image that neighbouring output pixels read, of which it takes
# up to so many together.
TALLEST, WIDEST, MOST_PIXELS = 16, 64, 4

# Convolutions take images of so few channels as they come, pixels or planes: their bytes are copied anyhow, and the copy takes
# planes in a fraction of the time in which Inductor turns them into pixels.
FEW_CHANNELS = 4


@dataclasses.dataclass(frozen=True)
class Depth:
    """The third dimension of a 3-d convolution, the outermost of an image: planes."""

    size: int = 1
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    x_stride: int = 0


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A 2-d or 3-d convolution of u8 (or a linear of s8 too, as one of 1×1 on its rows) with channels innermost.

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
    x_strides: tuple[int, int, int] = (0, 0, 0)  # of an image, a row and a pixel; 0: not known yet
    x_channel: int = 1  # from one channel to the next
    other_pixel: int = 0
    out_pixel: int = 0  # 0: no gaps between the output's pixels
    threads: int = 1  # 0: as many as there are when it runs
    depth: Depth = Depth()

    @property
    def d(self) -> int:
        return self.depth.size

    @property
    def out_d(self) -> int:
        depth = self.depth
        return _outputs(depth.size, depth.kernel, depth.stride, depth.padding, depth.dilation)

    @property
    def out_h(self) -> int:
        return self._outputs(self.h, 0)

    @property
    def out_w(self) -> int:
        return self._outputs(self.w, 1)

    def _outputs(self, size: int, axis: int) -> int:
        return _outputs(size, self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis])

    @property
    def pixels(self) -> int:
        """Of the output."""
        return self.n * self.out_d * self.out_h * self.out_w

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel of an image has a window of its own."""
        return self.groups == self.c == self.out_c and self.groups > 1 and self.depth == Depth()

    @property
    def has_depthwise_kernel(self) -> bool:
        """Whether the kernel for depthwise convolutions takes it, which has the loops over a window written out."""
        reach = (MOST_PIXELS - 1) * self.stride[1] + (self.kernel[1] - 1) * self.dilation[1] + 1
        return self.is_depthwise and self.kernel[0] <= TALLEST and reach <= WIDEST

    @property
    def macs(self) -> int:
        return self.pixels * self.out_c * (self.c // self.groups) * math.prod(self.kernel) * self.depth.kernel

    @property
    def copied(self) -> bool:
        """Whether the input is first copied: with its padding, or without gaps between channels and pixels."""
        gaps = self.x_channel != 1 or (self.kernel[1] > 1 and self.x_strides[2] not in (0, self.c))
        return not self.has_depthwise_kernel and (any(self.padding) or self.depth.padding > 0 or gaps)

    @property
    def row_runs(self) -> tuple[int, int]:
        """The contiguous bytes that an output reads of a row of the kernel: how many runs of how many bytes."""
        columns, bytes_ = self.kernel[1], self.c // self.groups
        whole = self.groups == 1 and (columns == 1 or self.dilation[1] == 1)
        return (1, columns * bytes_) if whole else (columns, bytes_)

    @property
    def runs(self) -> int:
        """How many runs an output reads."""
        return self.depth.kernel * self.kernel[0] * self.row_runs[0]

    @property
    def group_vectors(self) -> int:
        return math.ceil(self.out_c / self.groups / self.lanes)

    @property
    def channel_count(self) -> int:
        """How many channels the numbers of a layer are laid out for: vectors are filled up, a group at a time."""
        if self.has_depthwise_kernel:
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

    @property
    def constants_size(self) -> int:
        """How many bytes a kernel reads of what `constants` gives."""
        numbers = 4 * (3 * self.channel_count + SCALARS)
        if self.has_depthwise_kernel:
            weight = self.channel_count * self.kernel[1] * math.ceil(self.kernel[0] / 4) * 4
        else:
            fours = math.ceil(self.row_runs[1] / 4)
            weight = self.group_vectors * self.groups * self.runs * (fours * 4 * self.lanes + self.pairs)
        return math.ceil(numbers / ALIGNMENT) * ALIGNMENT + weight

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The int8 weight (out, in/groups, (kd,) kh, kw) in the order in which the kernel reads it, one-dimensional."""
        if self.has_depthwise_kernel:
            taps = weight[self._depthwise_order(), 0].unflatten(0, (-1, 4 * self.lanes))  # block, channel, kh, kw
            taps = functional.pad(taps, (0, 0, 0, -taps.shape[2] % 4)).unflatten(2, (-1, 4))
            return taps.permute(0, 4, 2, 1, 3).contiguous().flatten()  # block, kw, four, channel, 4
        _, size = self.row_runs
        grouped = weight.movedim(1, -1).reshape(self.groups, -1, self.runs, size)
        grouped = functional.pad(grouped, (0, -size % 4, 0, 0, 0, -grouped.shape[1] % self.lanes))
        vectors = grouped.unflatten(1, (-1, self.lanes)).unflatten(-1, (-1, 4))  # group, vector, lane, run, four, 4
        packed = vectors.permute(0, 1, 3, 4, 2, 5).contiguous()
        return torch.cat([packed.flatten(), self._overflows(packed).flatten()]) if self.pairs else packed.flatten()

    @property
    def pairs(self) -> int:
        """How many pairs of four bytes of a run the kernel may add in 16 bits, before it widens them."""
        return self.row_runs[1] // 8 if self.fits_16 and not self.has_depthwise_kernel else 0

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
        # A dynamic kernel multiplies by zero point and scale of the input itself: they are its arguments.
        zero_point = 1 if epilogue.dynamic else numbers.x_zero_point + (128 if self.x_signed else 0)
        x_scale = 1.0 if epilogue.dynamic else numbers.x_scale
        compensation = -zero_point * weight.flatten(1).sum(1, dtype=torch.int32)
        steps = numbers.steps if epilogue.in_steps else 1.0
        scale = (numbers.weight_scale.double() * x_scale * steps).expand(self.out_c)
        bias = torch.zeros(self.out_c) if numbers.bias is None else numbers.bias.double() * steps
        rows = torch.stack([compensation.int(), *(_bits(values) for values in (scale, bias))])
        if self.has_depthwise_kernel:
            rows = rows[:, self._depthwise_order()]
        else:
            rows = rows.unflatten(1, (self.groups, -1))
            rows = functional.pad(rows, (0, -rows.shape[-1] % self.lanes)).flatten(1)
        floats = torch.tensor([numbers.other_scale * steps, numbers.other_zero_point])
        integers = [torch.tensor(values, dtype=torch.int32) for values in (
            (numbers.zero_point, *epilogue.limits(numbers)), (numbers.x_zero_point,)
        )]  # fmt: skip
        scalars = torch.tensor(epilogue.scalars(numbers)).view(torch.int32)
        tail = [_bits(torch.tensor([numbers.steps])), integers[0], _bits(floats), scalars, integers[1]]
        return torch.cat([rows.flatten(), *tail])

    def largest_step(self, weight: torch.Tensor, numbers: Numbers) -> float:
        """How many steps of the output a result can be, whatever the bytes that are read, before it is limited."""
        sums = 255 * weight.flatten(1).short().abs().sum(1)
        largest = (sums * numbers.weight_scale.double() * numbers.x_scale).max() + 255 * numbers.other_scale
        bias = 0.0 if numbers.bias is None else numbers.bias.abs().max()
        return float(largest + bias) * numbers.steps


def _outputs(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of numbers in single precision; what exceeds it becomes its largest number, so that 0 times it is 0."""
    largest = torch.finfo(torch.float32).max
    return values.float().clamp(-largest, largest).contiguous().view(torch.int32)
