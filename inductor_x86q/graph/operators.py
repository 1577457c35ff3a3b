"""The operators that this package knows, one row each; all else that lists operators derives from these rows.

A row holds the operator's overloads in exported graphs, which the quantizer reads, and in decomposed ones, which the
passes read: in-place `relu_` occurs in the former only, `prims.rev` in the latter only.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import attention, qdq, recurrence  # noqa: F401  attention defines an operator
from inductor_x86q.inductor import fake_tensors

fake_tensors.register_primitives()


class Role(enum.Enum):
    """What an operator is to those who read a graph."""

    CONVOLUTION = enum.auto()
    TRANSPOSED_CONVOLUTION = enum.auto()
    LINEAR = enum.auto()
    LINEAR_16 = enum.auto()  # of a float16 weight, which oneDNN packs
    PRODUCT = enum.auto()  # of matrices; a linear where the second is a parameter
    INTEGER_PRODUCT = enum.auto()
    ATTENTION = enum.auto()
    RECURRENT = enum.auto()
    EMBEDDING = enum.auto()
    ACTIVATION = enum.auto()
    ADDITION = enum.auto()
    POINTWISE = enum.auto()  # any other that computes each element of its own
    VIEW = enum.auto()  # says otherwise where the elements of its first argument are
    MOVEMENT = enum.auto()  # puts elements of its first argument, and nothing else, into its result
    SPLIT = enum.auto()  # the same with a list of results
    ITEM = enum.auto()  # picks one result of a list
    JOIN = enum.auto()  # takes a list of tensors
    DROPOUT = enum.auto()
    PAD = enum.auto()
    MAX_POOL = enum.auto()
    MAX_POOL_WITH_POSITIONS = enum.auto()  # gives the maxima and their positions
    AVERAGE_POOL = enum.auto()
    MEAN = enum.auto()
    CAST = enum.auto()
    QUANTIZE = enum.auto()
    DEQUANTIZE = enum.auto()
    OTHER = enum.auto()


@dataclasses.dataclass(frozen=True)
class PostOperation:
    """What the library's kernels can do behind a product, found by trying each on all supported versions of torch."""

    name: str  # the library's
    kernels: frozenset[str]  # those that take it
    after_addition: frozenset[str] = frozenset()  # those that take it behind an addition too
    scalars: tuple[str, ...] = ()  # which of the operator's arguments are the kernel's scalars
    algorithm: str = ""  # which argument names the algorithm


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """A row of the table."""

    role: Role
    overloads: tuple[Any, ...]
    name: str = ""  # in reports; empty: its own name
    channels: int | None = None  # which dimension of its result its output channels are
    factors: tuple[int, ...] = ()  # the positions of the two tensors that it multiplies, the weight second
    kernel: str = ""  # the library's kernel that computes it, where the operator alone says which
    post_operations: tuple[PostOperation, ...] = ()  # what the kernels call it
    clips: bool = False  # whether it does nothing but clip to a range
    keeps_rows: bool = False  # whether, by its arguments, it may move whole rows only
    shares_memory: bool = False  # whether its result may lie in its first argument's memory, once Inductor lowered it
    dimensions: int = 0  # how many an image has that it pools


def _overloads(names: str) -> tuple[Any, ...]:
    """The overloads of these names: of aten where they have no namespace, the default one where they name none."""
    found = []
    for name in names.split():
        namespace, _, rest = name.rpartition("::")
        packet, _, overload = rest.partition(".")
        library = getattr(torch.ops, namespace or "aten")
        found.append(getattr(getattr(library, packet), overload or "default"))
    return tuple(found)


def _row(role: Role, names: str, name: str = "", **fields: Any) -> Operator:
    return Operator(role, _overloads(names), name, **fields)


def _activation(names: str, **fields: Any) -> Operator:
    return _row(Role.ACTIVATION, names, **fields)


def _post(name: str, kernels: str, *, after_addition: str = "", **fields: Any) -> tuple[PostOperation, ...]:
    return (PostOperation(name, frozenset(kernels.split()), frozenset(after_addition.split()), **fields),)


_LAYERS = (
    _row(Role.CONVOLUTION, "convolution", "conv", channels=1, factors=(0, 1)),
    _row(Role.CONVOLUTION, "conv1d conv1d.padding", "conv", channels=1, factors=(0, 1), kernel="conv1d"),
    _row(Role.CONVOLUTION, "conv2d conv2d.padding", "conv", channels=1, factors=(0, 1), kernel="conv2d"),
    _row(Role.CONVOLUTION, "conv3d conv3d.padding", "conv", channels=1, factors=(0, 1), kernel="conv3d"),
    _row(Role.TRANSPOSED_CONVOLUTION, "conv_transpose1d conv_transpose2d.input conv_transpose3d.input", "conv_transpose",
         channels=1, factors=(0, 1)),
    _row(Role.LINEAR, "linear", "linear", channels=-1, factors=(0, 1), kernel="linear"),
    _row(Role.LINEAR_16, "onednn::linear_dynamic_fp16 onednn::linear_relu_dynamic_fp16", "linear", factors=(0, 1)),
    _row(Role.PRODUCT, "mm matmul bmm", "matmul", channels=-1, factors=(0, 1), kernel="linear"),
    _row(Role.PRODUCT, "addmm baddbmm", "matmul", channels=-1, factors=(1, 2), kernel="linear"),
    _row(Role.INTEGER_PRODUCT, "_int_mm", "matmul", factors=(0, 1)),
    _row(Role.ATTENTION, "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
         "_scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable "
         "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
         "_scaled_dot_product_cudnn_attention "
         "inductor_x86q::attention", "attention", factors=(0, 1)),
    _row(Role.RECURRENT, "mkldnn_rnn_layer", "lstm", factors=(0,)),  # one direction of one layer
    _row(Role.RECURRENT, "lstm.input lstm.data gru.input gru.data rnn_tanh.input rnn_relu.input lstm_cell gru_cell "
         "rnn_tanh_cell rnn_relu_cell", factors=(0,)),
    Operator(Role.RECURRENT, (recurrence.RECURRENCE, recurrence.PACKED_RECURRENCE)),  # on an int8 weight
)  # fmt: skip

_COMPUTED = (
    _row(Role.EMBEDDING, "embedding"),
    _activation("relu relu_", clips=True, post_operations=_post(
        "relu", "conv1d conv2d linear", after_addition="conv2d linear")),
    _activation("hardtanh hardtanh_", clips=True, post_operations=_post(
        "hardtanh", "conv2d linear", scalars=("min_val", "max_val"))),
    _activation("relu6 relu6_ clamp clamp_ clamp_min", clips=True),  # spelled relu or hardtanh for the kernels
    _activation("hardswish hardswish_", post_operations=_post("hardswish", "conv2d linear")),
    _activation("silu silu_", post_operations=_post("swish", "conv2d linear")),
    _activation("gelu gelu_", post_operations=_post("gelu", "linear", algorithm="approximate")),
    _activation("leaky_relu leaky_relu_", post_operations=_post("leaky_relu", "linear", scalars=("negative_slope",))),
    _activation("tanh tanh_", post_operations=_post("tanh", "linear")),
    # All kernels refuse these.
    _activation("sigmoid sigmoid_"),
    _activation("hardsigmoid hardsigmoid_"),
    _activation("elu elu_"),
    _activation("celu celu_"),
    _activation("selu selu_"),
    _activation("softplus"),
    _activation("mish"),
    _row(Role.ADDITION, "add.Tensor add_.Tensor", post_operations=(
        *_post("sum", "conv2d linear"),  # into the memory of what is added
        *_post("add", "linear"))),
    _row(Role.POINTWISE, "sub.Tensor"),
    _row(Role.POINTWISE, "mul.Tensor mul_.Tensor"),
    _row(Role.POINTWISE, "div.Tensor"),
    _row(Role.POINTWISE, "batch_norm"),
    _row(Role.POINTWISE, "minimum"),
    _row(Role.POINTWISE, "maximum"),
    _row(Role.PAD, "pad constant_pad_nd", "pad"),
    _row(Role.MAX_POOL, "max_pool1d max_pool2d max_pool3d", "max_pool"),
    _row(Role.MAX_POOL_WITH_POSITIONS, "prims::_low_memory_max_pool_with_offsets", "max_pool"),
    # Of windows too large for Inductor's own.
    _row(Role.MAX_POOL_WITH_POSITIONS, "max_pool2d_with_indices max_pool3d_with_indices"),
    _row(Role.AVERAGE_POOL, "avg_pool1d", dimensions=1),
    _row(Role.AVERAGE_POOL, "avg_pool2d", dimensions=2),
    _row(Role.AVERAGE_POOL, "avg_pool3d", dimensions=3),
    _row(Role.MEAN, "mean mean.dim"),
    _row(Role.MEAN, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    _row(Role.CAST, "prims::convert_element_type quantized_decomposed::convert_element_type.no_fuse", "cast"),
    Operator(Role.QUANTIZE, (*qdq.QUANTIZES, qdq.QUANTIZE_TOKEN), "quantize"),
    Operator(Role.DEQUANTIZE, (*qdq.DEQUANTIZES, qdq.DEQUANTIZE_TOKEN), "dequantize"),
)  # fmt: skip

# Quantize and dequantize pass through these exactly: the result shares scale and zero point with its tensors.
_MOVED = (
    _row(Role.VIEW, "view reshape", keeps_rows=True),
    _row(Role.VIEW, "flatten.using_ints unflatten.int view_as reshape_as"),
    _row(Role.VIEW, "permute", keeps_rows=True),
    _row(Role.VIEW, "transpose.int t swapaxes swapdims movedim.int movedim.intlist moveaxis.int moveaxis.intlist"),
    _row(Role.VIEW, "squeeze squeeze.dim squeeze.dims unsqueeze"),
    _row(Role.VIEW, "expand expand_as"),
    _row(Role.VIEW, "slice.Tensor", keeps_rows=True),
    _row(Role.VIEW, "select.int", keeps_rows=True),
    _row(Role.VIEW, "narrow unfold alias"),
    _row(Role.MOVEMENT, "clone", keeps_rows=True, shares_memory=True),  # a clone is Inductor's to drop
    _row(Role.MOVEMENT, "contiguous", shares_memory=True),
    _row(Role.MOVEMENT, "detach detach_", shares_memory=True),
    _row(Role.MOVEMENT, "flip prims::rev roll repeat tile"),
    _row(Role.MOVEMENT, "index.Tensor _unsafe_index.Tensor index_select"),
    _row(Role.MOVEMENT, "pixel_shuffle pixel_unshuffle channel_shuffle"),
    _row(Role.MOVEMENT, "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest1d.vec "
         "upsample_nearest2d.vec upsample_nearest3d.vec"),
    _row(Role.SPLIT, "split.Tensor split split_with_sizes chunk unbind.int tensor_split.sections"),
    _row(Role.JOIN, "cat concat stack"),
    _row(Role.DROPOUT, "dropout dropout_ feature_dropout"),
    Operator(Role.ITEM, (operator.getitem,)),
    _row(Role.OTHER, "as_strided diagonal", shares_memory=True),
)  # fmt: skip

OPERATORS = (*_LAYERS, *_COMPUTED, *_MOVED)

_ROWS: dict[Any, Operator] = {target: row for row in OPERATORS for target in row.overloads}


def targets(*roles: Role) -> tuple[Any, ...]:
    """All overloads of the operators that have one of these roles."""
    return tuple(target for target, row in _ROWS.items() if row.role in roles)


# --- what a node is ---------------------------------------------------------------------------------------------------


def find(node: Any) -> Operator | None:
    """The row of the operator that the node calls."""
    return _ROWS.get(node.target) if isinstance(node, fx.Node) else None


def role(node: Any) -> Role | None:
    row = find(node)
    return None if row is None else row.role


def is_movement(node: Any) -> bool:
    """Whether the node takes its tensor first and puts elements of it, and nothing else, into its result."""
    return role(node) in (Role.VIEW, Role.MOVEMENT)


def is_item(node: Any) -> bool:
    """Whether the node picks one result of a list."""
    return role(node) is Role.ITEM


def is_clip(node: Any) -> bool:
    row = find(node)
    return row is not None and row.clips


def is_relu(node: Any) -> bool:
    return any(post.name == "relu" for post in post_operations(node))


def shares_memory(node: Any) -> bool:
    """Whether the node's result may lie in its first argument's memory, in eager mode or once Inductor lowered it."""
    row = find(node)
    # An indexed result of a list is a view of what the list is a view of.
    return row is not None and (row.shares_memory or row.role in (Role.VIEW, Role.SPLIT, Role.ITEM))


def channels(layer: fx.Node) -> int:
    """Which dimension of the result of a convolution, linear or product its output channels are."""
    found = _ROWS[layer.target].channels
    assert found is not None, f"{layer.target} has no channels in the table"
    return found


def image_dimensions(pool: fx.Node) -> int:
    """How many dimensions an image has that the node pools."""
    return _ROWS[pool.target].dimensions


def factors(node: fx.Node) -> tuple[Any, ...]:
    """The tensors that the node multiplies, activation and weight; of attention queries and keys."""
    row = find(node)
    if row is None or not row.factors:
        return ()
    arguments = tuple(qdq.schema_arguments(node).values())
    return tuple(arguments[position] for position in row.factors)


def moved_from(node: fx.Node, *, through_qdq: bool = False) -> fx.Node:
    """Where the elements of `node` come from, through what only moves them and, if asked for, q/dq."""
    while is_movement(node) or (through_qdq and (qdq.is_quantize(node) or qdq.is_dequantize(node))):
        node = qdq.operand(node)
    return node


# --- names ------------------------------------------------------------------------------------------------------------


def own_name(node: fx.Node) -> str:
    """The name of the operator that the node calls, without namespace and overload; of any other node what it reads."""
    if node.op != "call_function":
        return str(node.target)
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema else getattr(node.target, "__name__", str(node.target))


def name(node: fx.Node) -> str:
    """What reports call the operator."""
    row = find(node)
    return row.name if row is not None and row.name else own_name(node).lstrip("_")


# --- what kernels take ------------------------------------------------------------------------------------------------


def post_operations(node: Any) -> tuple[PostOperation, ...]:
    row = find(node)
    return () if row is None else row.post_operations


def can_clip(layer: Any) -> bool:
    """Whether the kernel that the convolution, linear or product becomes can clip its result to any range."""
    row = find(layer)
    return row is not None and bool(row.kernel) and takes(row.kernel, "hardtanh")


def takes(kernel: str, name: str, *, after_addition: bool = False) -> bool:
    """Whether the library's kernel can end in the post-operation of that name."""
    return name in (_TAKEN_AFTER_ADDITION if after_addition else _TAKEN)[kernel]


KERNELS = ("conv1d", "conv2d", "conv3d", "linear")
_POSTS = [post for row in OPERATORS for post in row.post_operations]
_TAKEN = {kernel: {post.name for post in _POSTS if kernel in post.kernels} for kernel in KERNELS}
_TAKEN_AFTER_ADDITION = {kernel: {post.name for post in _POSTS if kernel in post.after_addition} for kernel in KERNELS}

# --- groups of overloads, as rules are anchored at them ---------------------------------------------------------------

CONVERT = torch.ops.prims.convert_element_type.default
RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)
MOVEMENTS = targets(Role.VIEW, Role.MOVEMENT)
ROW_MOVEMENTS = tuple(target for target, row in _ROWS.items() if row.keeps_rows)
SPLITS = targets(Role.SPLIT)
JOINS = targets(Role.JOIN)
PRODUCTS = targets(Role.PRODUCT)
MAX_POOLS = targets(Role.MAX_POOL_WITH_POSITIONS)
LOW_MEMORY_MAX_POOL = torch.ops.prims._low_memory_max_pool_with_offsets.default
LARGE_MAX_POOLS = tuple(target for target in MAX_POOLS if target is not LOW_MEMORY_MAX_POOL)
# Activations that some kernel can end in.
UNARIES = tuple(target for target in targets(Role.ACTIVATION) if _ROWS[target].post_operations)
