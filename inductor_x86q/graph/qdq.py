"""Reading and writing quantize and dequantize nodes, typed.

After the normalize stage there is one spelling of each:

* activations: `quantize_per_tensor.default` / `dequantize_per_tensor.default`, scale and zero point Python numbers;
* activations with parameters computed at run time: the `.tensor` overloads;
* weights: `dequantize_per_channel.default` of a constant, scale and zero point constants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor import fake_tensors

fake_tensors.register_quantized_decomposed()
fake_tensors.register_primitives()
_q = torch.ops.quantized_decomposed

SMALLEST_SCALE = 2.0**-24  # of values that are all zeros, where nobody else says
QUANTIZE = _q.quantize_per_tensor.default
DEQUANTIZE = _q.dequantize_per_tensor.default
QUANTIZE_TENSOR = _q.quantize_per_tensor.tensor
DEQUANTIZE_TENSOR = _q.dequantize_per_tensor.tensor
QUANTIZE_CHANNEL = _q.quantize_per_channel.default
DEQUANTIZE_CHANNEL = _q.dequantize_per_channel.default

QUANTIZES = (QUANTIZE, QUANTIZE_TENSOR, _q.quantize_per_tensor.tensor2, QUANTIZE_CHANNEL)
DEQUANTIZES = (DEQUANTIZE, DEQUANTIZE_TENSOR, _q.dequantize_per_tensor.tensor2, DEQUANTIZE_CHANNEL)

# A scale and a zero point for each row. No pass but normalize knows of them: it puts the scales behind the product.
QUANTIZE_TOKEN = _q.quantize_per_token.default
DEQUANTIZE_TOKEN = _q.dequantize_per_token.default

# Through which a tensor's elements are those that it had; a fill as another tensor has its dimensions in another order.
_ORDERS = (torch.ops.aten.permute.default, torch.ops.aten.expand.default)
_FILLS = (torch.ops.aten.full.default, torch.ops.aten.full_like.default, torch.ops.aten.new_full.default)
INT8_TYPES = (torch.uint8, torch.int8)


@dataclasses.dataclass(frozen=True)
class QParams:
    """How a tensor is quantized: real = (integer - zero_point) * scale, integers in [quant_min, quant_max]."""

    scale: Any  # float, or a node where it is computed at run time or stored as a tensor
    zero_point: Any  # int, or a node
    quant_min: int
    quant_max: int
    dtype: torch.dtype
    axis: int | None = None  # of a per-channel quantization

    @property
    def is_static(self) -> bool:
        """Whether scale and zero point are plain numbers."""
        return not isinstance(self.scale, fx.Node) and not isinstance(self.zero_point, fx.Node)

    @property
    def is_full_range(self) -> bool:
        info = torch.iinfo(self.dtype)
        return self.quant_min <= info.min and self.quant_max >= info.max

    def arguments(self) -> tuple[Any, ...]:
        """The arguments after the tensor, in the order of the operators' schema."""
        axis = () if self.axis is None else (self.axis,)
        return (self.scale, self.zero_point, *axis, self.quant_min, self.quant_max, self.dtype)

    def same_grid(self, other: QParams) -> bool:
        """Whether integers mean the same real numbers in both (the allowed ranges may differ)."""
        mine = (self.scale, self.zero_point, self.dtype, self.axis)
        return mine == (other.scale, other.zero_point, other.dtype, other.axis)


def is_quantize(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in QUANTIZES


def is_dequantize(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in DEQUANTIZES


def qparams(node: fx.Node) -> QParams:
    """The parameters of a quantize or dequantize node."""
    arguments = schema_arguments(node)
    axis = arguments.get("axis")
    scale, zero_point = (
        (arguments["scale"], arguments["zero_point"])
        if axis is None
        else (arguments["scales"], arguments["zero_points"])
    )
    return QParams(scale, zero_point, arguments["quant_min"], arguments["quant_max"], arguments["dtype"], axis)


def out_dtype(node: fx.Node) -> torch.dtype:
    """The float type that a dequantize node produces."""
    found: Any = node.kwargs.get("out_dtype")
    return found or torch.float32


def operand(node: fx.Node, position: int = 0) -> fx.Node:
    """The argument at this position, which its operator's schema says is a tensor."""
    found = node.args[position]
    assert isinstance(found, fx.Node), f"argument {position} of {node.format_node()} is no tensor"
    return found


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of its operator's schema, defaults filled in."""
    found: dict[str, Any] = {}
    target: Any = node.target
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def evaluate(node: fx.Node, *arguments: Any, **keywords: Any) -> Any:
    """What the node's operator gives for these arguments."""
    assert callable(node.target), f"{node} calls no operator"
    return node.target(*arguments, **keywords)


def graph_module(node: fx.Node) -> fx.GraphModule:
    """The module that the node's graph is of, and that holds its constants."""
    found = node.graph.owning_module
    assert found is not None, "a graph without a module"
    return found


def value(node: Any) -> torch.Tensor:
    """The fake tensor that stands for what the node computes: its shape, type and strides."""
    return node.meta["val"]


def constant(node: Any) -> torch.Tensor | None:
    """The tensor behind a `get_attr` node, None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, torch.Tensor) else None


def uniform_value(node: fx.Node) -> float | None:
    """The number that all elements of a tensor are known to have, None where there is none."""
    while node.target in _ORDERS:
        node = operand(node)
    if node.target in _FILLS:
        fill = node.args[-1]
        return float(fill) if isinstance(fill, (int, float)) else None
    tensor = constant(node)
    if tensor is None or not tensor.numel() or bool((tensor != tensor.reshape(-1)[0]).any()):
        return None
    return float(tensor.reshape(-1)[0])


def is_constant(node: fx.Node) -> bool:
    """Whether the value depends on parameters and buffers only."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder" or (current.op != "get_attr" and not current.all_input_nodes):
            return False
        pending.extend(current.all_input_nodes)
    return True


def constants(graph: fx.Graph, variables: Collection[fx.Node] = ()) -> set[fx.Node]:
    """All nodes of which `is_constant` holds and that do not depend on these variables, found in one go."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if (node.op == "get_attr" and node not in variables) or (
            node.op != "placeholder" and inputs and all(x in found for x in inputs)
        ):
            found.add(node)
    return found


def new_constant(tensor: torch.Tensor, *, like: fx.Node) -> fx.Node:
    """A `get_attr` node for a new constant, at the graph's insertion point, described as coming from `like`."""
    graph = like.graph
    module: Any = graph_module(like)
    number = getattr(module, "_x86q_constants", 0)
    module._x86q_constants = number + 1
    name = f"_x86q_constant{number}"
    fake_tensors.mark_frozen(tensor)
    module.register_buffer(name, tensor)
    node = graph.get_attr(name)
    copy_origin(node, like)
    with fake_tensors.fake_mode(graph) as mode:
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    return node


def store(module: fx.GraphModule, name: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
    """A buffer under a dotted name, with a number appended where that is taken, and the node that reads it."""
    *path, last = name.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part)
    unique = free_attribute(owner, last)
    owner.register_buffer(unique, tensor.detach().clone())
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(".".join([*path, unique]))
    copy_origin(node, before)
    with fake_tensors.fake_mode(module.graph) as mode:
        node.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
    return node


def free_attribute(owner: torch.nn.Module, name: str) -> str:
    """The name, with a number appended where the module has such an attribute."""
    number, unique = 1, name
    while hasattr(owner, unique):
        number, unique = number + 1, f"{name}{number}"
    return unique


def call(target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """A new node at the insertion point of `like`'s graph, with its value's description, said to come from `like`."""
    node = like.graph.call_function(target, args, kwargs)
    copy_origin(node, like)
    fake_tensors.propagate_fake_tensors(node)
    return node


def quantize(node: Any, parameters: QParams, *, like: fx.Node) -> fx.Node:
    target = QUANTIZE if parameters.is_static else QUANTIZE_TENSOR
    return call(target, node, *parameters.arguments(), like=like)


def dequantize(node: Any, parameters: QParams, dtype: torch.dtype = torch.float32, *, like: fx.Node) -> fx.Node:
    if parameters.axis is not None:
        target = DEQUANTIZE_CHANNEL
    else:
        target = DEQUANTIZE if parameters.is_static else DEQUANTIZE_TENSOR
    kwargs = {} if dtype == torch.float32 else {"out_dtype": dtype}
    return call(target, node, *parameters.arguments(), like=like, **kwargs)


ORIGIN_FIELDS = ("nn_module_stack", "stack_trace", "from_node", "source_fn_stack", "custom", "x86q_reported")


def copy_origin(node: fx.Node, like: fx.Node) -> None:
    """Copies from `like` what says where in the model a node comes from."""
    for field in ORIGIN_FIELDS:
        if field in like.meta:
            node.meta[field] = like.meta[field]


def operands(node: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The two operands of a sum or product, in both orders."""
    first, second = node.args[:2]
    return (first, second), (second, first)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's single user, None if there are none or more."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def erase_dead(node: fx.Node) -> None:
    """Erases `node` and, upwards, whatever only it used; constants included."""
    pending = [node]
    while pending:
        current = pending.pop()
        if current.users or current.op in ("placeholder", "output") or current._erased:
            continue
        pending.extend(current.all_input_nodes)
        current.graph.erase_node(current)


def compute_ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that `node` depends on, itself left out."""
    found: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return found
