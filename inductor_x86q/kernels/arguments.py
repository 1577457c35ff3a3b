"""What a kernel is told of a layer when it is called, the same for C++ and Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inductor_x86q.kernels import library

if TYPE_CHECKING:
    from inductor_x86q.kernels.convolution import Convolution

# Names in order, and what they are; all are int64. Strides are in elements.
FIELDS: dict[str, str] = {
    "n": "images",
    "d": "planes of an image",
    "h": "rows of a plane",
    "w": "pixels of a row",
    "c": "channels of a pixel",
    "out_c": "channels of an output pixel",
    "groups": "",
    "kernel_d": "",
    "kernel_h": "",
    "kernel_w": "",
    "stride_d": "",
    "stride_h": "",
    "stride_w": "",
    "pad_d": "",
    "pad_h": "",
    "pad_w": "",
    "dilation_d": "",
    "dilation_h": "",
    "dilation_w": "",
    "x_image": "stride of an image, of its planes, rows, pixels and channels",
    "x_plane": "",
    "x_row": "",
    "x_pixel": "",
    "x_channel": "",
    "other_pixel": "stride of what is added",
    "out_pixel": "stride of the output",
    "is_copied": "whether the image is copied first, with its padding, or without gaps",
    "row_runs": "an output pixel reads kernel_d times kernel_h rows, and of each so many runs of bytes",
    "run": "bytes of a run",
    "group_vectors": "vectors of a group's output channels",
    "channels": "how many channels the layer's numbers are laid out for",
    "threads": "0: as many as there are",
    "x_scales": "of a dynamic kernel: address of the input's scale as float, or of the scales of its pixels",
    "x_scales_step": "1: each pixel has a scale",
    "x_zero_points": "of a dynamic kernel: address of the input's zero point as int32, or of those of its pixels",
    "x_zero_points_step": "1: each pixel has a zero point",
}

STRUCT = library.struct("X86qArguments", FIELDS)
PARAMETERS = "const void* x, const void* constants, const void* other, void* out, const X86qArguments* arguments"

Size = int | str  # a number, or the C++ that gives one when it runs


def arguments(convolution: Convolution, **open_: Size) -> tuple[Size, ...]:
    """The values of `FIELDS` for a layer; `open_` says which are only known when it runs, as C++."""
    c = convolution
    row_runs, run = c.row_runs
    known: dict[str, Size] = {
        **dict(n=c.n, d=c.d, h=c.h, w=c.w, c=c.c, out_c=c.out_c, groups=c.groups),
        **dict(kernel_d=c.depth.kernel, stride_d=c.depth.stride, pad_d=c.depth.padding, dilation_d=c.depth.dilation),
        **dict(kernel_h=c.kernel[0], kernel_w=c.kernel[1], stride_h=c.stride[0], stride_w=c.stride[1]),
        **dict(pad_h=c.padding[0], pad_w=c.padding[1], dilation_h=c.dilation[0], dilation_w=c.dilation[1]),
        **dict(
            x_image=c.x_strides[0],
            x_plane=c.depth.x_stride,
            x_row=c.x_strides[1],
            x_pixel=c.x_strides[2],
            x_channel=c.x_channel,
        ),
        **dict(other_pixel=c.other_pixel, out_pixel=c.out_pixel or c.out_c, is_copied=int(c.copied)),
        **dict(row_runs=row_runs, run=run, group_vectors=c.group_vectors, channels=c.channel_count, threads=c.threads),
        **dict(x_scales=0, x_scales_step=0, x_zero_points=0, x_zero_points_step=0),
    }
    assert open_.keys() <= known.keys(), f"no arguments of a kernel: {open_.keys() - known.keys()}"
    return tuple((known | open_)[name] for name in FIELDS)
