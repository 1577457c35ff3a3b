"""Each pass broken on purpose, in one line of its source, and the graph whose numbers show it.

The graphs are run uncompiled against what they may compute (`tests.fuzz`), so a broken pass costs a fraction of a
second. A breakage whose line is no longer in the source fails with a request to write it anew.
"""

from __future__ import annotations
import __future__

import dataclasses
import inspect
import logging
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest

from inductor_x86q import cpu
from inductor_x86q.graph import aliasing, operators, outputs
from inductor_x86q.graph import calls as call
from inductor_x86q.inductor import decompositions
from inductor_x86q.passes import channels, finish, propagate
from inductor_x86q.passes.fuse import attention, compute, output_types, own_kernels, pool, post_ops
from inductor_x86q.passes.normalize import channel_factors
from inductor_x86q.passes.normalize import spelling as normalize
from tests.fuzz.check import Mismatch, check, check_exactly
from tests.fuzz.graphs import Graph
from tests.mutation_graphs import GRAPHS


@dataclasses.dataclass(frozen=True)
class Broken:
    """A function, one piece of its source, what stands there instead, and the graph that shows it to `check`."""

    name: str
    function: Any
    old: str
    new: str
    graph: str
    check: Callable[[Graph], Any] = check


BROKEN = {
    "normalize": [
        Broken("drop a zero point given as a tensor", normalize._find_constant_parameters, "int(zero_point)", "0",
               "scales as tensors"),
        Broken("drop the zero point of a weight with one scale", normalize._find_short_weight,
               "parameters.zero_point or 0", "0", "weight with one scale and a zero point"),
        Broken("take every window for the whole image", normalize._find_average_of_all,
               "not fake_tensors.same_shape(images, window)", "False", "average pool of columns"),
        Broken("forget an average's divisor", normalize._find_average_of_all, "divisor is not None", "False",
               "average pool with a divisor"),
        Broken("forget an average's padding", normalize._find_average_of_all, "any(padding)", "False",
               "padded average pool"),
        Broken("leave the scales where a weight's channels move", normalize._find_constant_view,
               "weight.scale[channels]", "weight.scale[: len(channels)]", "slice of a weight"),
        Broken("forget alpha of a product", normalize._find_matrix_product, 'arguments.get("alpha", 1) != 1', "False",
               "alpha of a product"),
        Broken("forget to transpose", normalize._rewrite_matrix_product, "].t()", "]",
               "product"),
        Broken("take scales along the wrong axis", normalize._find_matrix_product,
               "axis != matrix.dim() - 1", "False", "product with scales along its inputs"),
        Broken("forget alpha of a bias", normalize._find_bias, '.get("alpha", 1) != 1', " is None",
               "alpha of a bias"),
        Broken("take any lower bound for relu", normalize._find_clamp, "high is None and low == 0", "high is None",
               "clamp on one side"),
        Broken("take any gate for its own", normalize._find_gated, "gate.args[0] is x", "True", "gate of another"),
        Broken("drop a cast to bf16", normalize._find_cast, "source if dtype == torch.float32 else", "source if True else",
               "rounded before a quantize", check_exactly),
        Broken("forget the type of a cast", normalize._rewrite_cast, "qdq.value(node).dtype, like", "torch.float32, like",
               "dequantized to bf16"),
        Broken("move a transpose before a linear", normalize.keeps_rows, 'arguments["dims"][-1] % len(before) == last', "True",
               "transposed linear"),
    ],
    "channel factors": [
        Broken("drop the factor of a bias", channel_factors._find, "bias.detach().float() * vector",
               "bias.detach().float()", "factor of each output"),
        Broken("drop the factor's sign", channel_factors._rewrite, "torch.where(factor < 0, -1, 1)",
               "torch.where(factor < 0, 1, 1)", "factor of each channel"),
        Broken("drop the factor", channel_factors._rewrite, "weight.scale.float() * factor.abs()",
               "weight.scale.float()", "factor of each channel"),
        Broken("turn -128 around", channel_factors._find, "bool((weight.integers[vector < 0] == -128).any())", "False",
               "negative factor of the lowest weight"),
        Broken("round a bias of 16 bits", channel_factors._find, "not torch.equal(bias.float(), exact)", "False",
               "factor behind a bias in bf16"),
        Broken("take a factor of rows for one of outputs", channel_factors._find,
               "not layers.is_channel_factor(other, layer, operators.channels(layer))", "False", "factor of each row"),
        Broken("forget a factor's wider type", channel_factors._find,
               "qdq.value(node).dtype != qdq.value(layer).dtype", "False", "wider factor"),
    ],
    "channels": [
        Broken("take a shuffle for none", channels._ordered_from, ".view(shuffled[1], -1).t()", ".view(shuffled[1], -1)",
               "shuffled channels"),
        Broken("leave the order of inputs", channels._rewrite_shuffled_input, "x, order, 0 if", "x, sorted(order), 0 if",
               "shuffled channels"),
        Broken("put outputs back the wrong way", channels._rewrite_shuffled_input, "torch.tensor(order).argsort()",
               "torch.tensor(order)", "shuffled channels of a depthwise convolution"),
        Broken("leave the order of biases", channels._with_weights, "bias = bias[indices]", "pass",
               "halves of shuffled channels"),
        Broken("leave the order of outputs", channels._rewrite_gathered_output, "qdq.operand(convolution), order, 0",
               "qdq.operand(convolution), sorted(order), 0", "halves of shuffled channels"),
    ],
    "propagate": [
        Broken("leave a large pool of signed integers to nobody", propagate._find_down_large_pool,
               "accepted if isinstance(accepted, No) else found", "found", "large max pool of signed"),
        Broken("join two grids", propagate._find_down, "not parameters.same_grid(found[0])", "False",
               "cat of two grids"),
        Broken("join two ranges to the first", propagate._joined,
               "min(p.quant_min for p in parameters), max(p.quant_max for p in parameters)",
               "parameters[0].quant_min, parameters[0].quant_max", "cat of two ranges"),
        Broken("pad with 0 instead of the zero point", propagate._find_down_pad,
               "fill / parameters.scale + parameters.zero_point", "fill / parameters.scale", "pad"),
        Broken("pad with an integer near by", propagate._find_down_pad, "integer != round(integer)", "False",
               "pad with what lies between two integers"),
        Broken("do not clip at the zero point", propagate._rewrite_down_relu, "parameters.zero_point > parameters.quant_min",
               "False", "relu of integers"),
        Broken("clip at 0 instead of the zero point", propagate._rewrite_down_relu,
               "integers, parameters.zero_point", "integers, 0", "relu of integers"),
        Broken("ignore a narrower range", propagate._rewrite_meeting,
               "after.quant_min > before.quant_min or after.quant_max < before.quant_max", "False", "narrower range"),
        Broken("drop a requantization", propagate._find_meeting, "not after.same_grid(before)", "False",
               "requantized"),
        Broken("quantize the parts of a split alike", propagate._find_up, "if other else parameters", "if False else parameters",
               "split to two grids"),
        Broken("forget the type of what moves", propagate._rewrite_down, "qdq.out_dtype(sources[0])",
               "torch.float32", "moved in bf16"),
        Broken("join two types", propagate._find_down, "len({qdq.out_dtype(tensor) for tensor in tensors}) > 1",
               "False", "cat of bf16 and fp32"),
        Broken("drop a rounding to bf16", propagate._find_meeting, "qdq.out_dtype(source) != torch.float32",
               "False", "rounded to bf16", check_exactly),
    ],
    "compute": [
        Broken("drop the input's zero point", compute._rewrite, "grid.scale, grid.zero_point,", "grid.scale, 0,", "linear"),
        Broken("drop the bias", compute._rewrite, "_as(node, layer.bias, torch.float32)", "None", "linear"),
        Broken("forget the dilation", compute._rewrite, "layer.geometry or ()",
               "layer.geometry._replace(dilation=[1, 1])", "dilated convolution"),
        Broken("forget the padding", compute._rewrite, "layer.geometry or ()",
               "layer.geometry._replace(padding=[0, 0])", "convolution"),
        Broken("ignore a weight's zero points", compute._weight_obstacle, "zero_point.count_nonzero()", "False",
               "weight with zero points"),
        Broken("take a weight's scales along any axis", compute._weight_obstacle, "parameters.axis != 0", "False",
               "convolution with scales along its inputs"),
        Broken("give a convolution signed input", compute._activation_obstacle,
               "node.target is CONVOLUTION and parameters.dtype == torch.int8", "False", "signed convolution"),
        Broken("take a transposed convolution for a convolution", compute.obstacle, "layer.transposed", "False",
               "weight of a transposed convolution"),
    ],
    "attention": [
        Broken("drop the zero points of its operands", attention._find, "(grid.scale, grid.zero_point)", "(grid.scale, 0)",
               "attention"),
        Broken("take the query for the key", attention._find, "map(qdq.operand, sources)",
               "map(qdq.operand, (sources[0], sources[0], sources[2]))", "attention"),
        Broken("forget its scale", attention._find, "(qdq.value(arguments[0]), scale)", "(qdq.value(arguments[0]), None)",
               "attention"),
        Broken("let queries see what comes later", attention._find, "is_causal, scale, largest)", "False, scale, largest)",
               "causal attention"),
        Broken("drop the zero point of its result", outputs.write, "output.arguments()",
               "(output.scale, 0, *output.arguments()[2:])", "quantized attention"),
    ],
    "recurrence": [
        Broken("drop the zero point of its output", outputs.write, "output.arguments()",
               "(output.scale, 0, *output.arguments()[2:])", "quantized steps"),
        Broken("drop the range of its output", outputs.write, "output.arguments()",
               "(*output.arguments()[:2], 0, 255, output.dtype)", "quantized steps in a narrow range"),
        Broken("forget to quantize its output", own_kernels._rewrite_quantize, "outputs.write(source, grid)", "pass",
               "quantized steps"),
        Broken("quantize what is read as it is too", own_kernels._producer, "len(readers) == 1", "True",
               "quantized steps that are read too"),
        Broken("take the states for the output", own_kernels._producer, "and result.args[1] == 0", "",
               "quantized states"),
    ],
    "pool": [
        Broken("forget ceil mode", pool._pool_2d, "bool(ceil_mode)", "False", "max pool, ceil mode"),
        Broken("exchange kernel and stride", pool._rewrite, "zip(kernel, stride, padding, dilation, strict=True)",
               "zip(stride, kernel, padding, dilation, strict=True)", "max pool, padding and dilation"),
        Broken("exchange padding and dilation", pool._rewrite, "zip(kernel, stride, padding, dilation, strict=True)",
               "zip(kernel, stride, dilation, padding, strict=True)", "max pool, padding and dilation"),
        Broken("give the library's pool signed input", pool.accepts, "x.dtype != torch.uint8", "False",
               "max pool of signed"),
        Broken("forget the frames", pool._pool_3d, "[parameters[0], (1, 1, 0, 1)]", "[(1, 1, 0, 1)] * 2",
               "max pool of frames"),
    ],
    "post-ops": [
        Broken("forget relu", post_ops._find_unary, "unary=merged", "unary=call.unary", "relu"),
        Broken("move relu behind the addition", post_ops._added,
               'call.binary or call.unary.name != "none"', "call.binary", "relu in front of an addition"),
        Broken("take any bound for 0", post_ops._find_implied_relu, "parameters.zero_point != parameters.quant_min",
               "False", "relu in front of a quantize"),
        Broken("keep the first of two clips", post_ops._merge, 'if first.name == "none":\n        return second',
               'return second', "hardtanh of relu"),
        Broken("forget alpha", post_ops._find_addition, 'arguments.get("alpha", 1) != 1', "False",
               "addition with alpha"),
        Broken("drop the added operand's zero point", post_ops._find_accumulator,
               "integers, parameters.scale, parameters.zero_point", "integers, parameters.scale, 0", "residual"),
        Broken("exchange the scales of sum and result", post_ops._find_accumulator,
               "integers, parameters.scale, parameters.zero_point",
               "integers, quantized.scale, parameters.zero_point", "residual"),
        Broken("add the other int8 type", post_ops._find_accumulator, "len(dtypes) == 1", "True",
               "residual of the other int8"),
        Broken("ignore a narrow range", post_ops._rewrite_quantize, "parameters.is_full_range", "True",
               "linear to a narrow range"),
        Broken("forget to round to fp16", output_types._rewrite_unsupported, "new, dtype, like",
               "new, torch.float32, like", "linear in fp16"),
        Broken("give fp32 for int8 where fp16 is added", output_types._rewrite_unsupported,
               "torch.float32 if _lacks_kernels(dtype) else dtype", "torch.float32", "residual in fp16"),
        Broken("add fp16 as it is", output_types._find_unsupported, "qdq.value(call.binary.other).dtype", "None",
               "residual in fp16"),
        Broken("read a call's result in its rounded place, which a sum is written into", output_types._find_there_and_back,
               "any(_sums_into(user, call) for user in call.users)", "False", "rounded result of a sum's accumulator"),
        Broken("drop the graph's own rounding to fp16", output_types._find_there_and_back,
               'call.meta.get("x86q_float32_for") != rounded.args[1]', "False", "rounded to fp16 by the graph",
               check_exactly),
        Broken("drop the result's zero point", call.with_output, "output_zero_point=zero_point",
               "output_zero_point=0", "convolution to int8"),
    ],
    "finish": [
        Broken("leave a weight's integers", finish._find_converted_constant,
               "return qdq.evaluate(node, *arguments[0], **arguments[1])", "return tensor.float()", "float weight"),
        Broken("drop keyword arguments", decompositions.decompose_node, "node.target(*arguments, **node.kwargs)",
               "node.target(*arguments)", "gelu of a convolution"),
        Broken("drop the slope", decompositions.decompose_node, "for a in node.args]", "for a in node.args[:1]]",
               "leaky relu of a convolution"),
        Broken("drop the bounds", decompositions.decompose_node, "for a in node.args]", "for a in node.args[:1]]",
               "hardtanh of floats"),
        Broken("leave what has no lowering", finish._decompose,
               "decompositions.decompose_node(module, node, WRITTEN_OUT)", "None", "gelu of a convolution"),
        Broken("dequantize the scales' neighbours", finish._find_converted_constant,
               "qdq.constant(n)", "qdq.constant(n).flip(0)", "weight of a transposed convolution"),
    ],
    "aliasing": [
        Broken("sum in place although the accumulator is read later", aliasing.may_overwrite,
               "not remaining <= needed", "False", "accumulator read later"),
        Broken("sum into an input of the graph", aliasing.may_overwrite, 'root.op != "call_function"', "False",
               "accumulator is an input"),
        Broken("sum into what is expanded", aliasing._is_dense, "stride == expected", "True", "accumulator is expanded"),
        Broken("do not look from a view to what it views", aliasing.base,
               "_lives_in(node)", "None",
               "accumulator is a view of what is read later"),
        Broken("do not look from a part to the whole", operators.shares_memory, ", Role.ITEM", "",
               "accumulator is a part of what is read later"),
        Broken("look one view far only", aliasing.base, "node = source", "return source",
               "accumulator is a part of what is read later"),
        Broken("do not look from a tensor to its views", aliasing.readers,
               "if _lives_in(user) is current", "if is_call(user) and _lives_in(user) is current",
               "a view of the accumulator is read later"),
        Broken("sum into the call's own input", post_ops._find_accumulator,
               "aliasing.base(integers) is not aliasing.base(call.x)", "True", "accumulator is the input"),
        Broken("do not copy the accumulator", post_ops._rewrite_addition, "not found.in_place", "False",
               "accumulator read later"),
    ],
}  # fmt: skip


def broken_code(broken: Broken) -> Any:
    """The code of `broken.function` with its one piece of source replaced."""
    source = textwrap.dedent(inspect.getsource(broken.function))
    count = source.count(broken.old)
    assert count == 1, f"{broken.function.__qualname__} has {broken.old!r} {count} times: write this breakage anew"
    flags = __future__.annotations.compiler_flag
    namespace: dict[str, Any] = {}
    exec(
        compile(source.replace(broken.old, broken.new), inspect.getfile(broken.function), "exec", flags),
        broken.function.__globals__,
        namespace,
    )
    function = namespace[broken.function.__name__]
    assert isinstance(function, FunctionType)
    return function.__code__


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bf16 instructions make superfluous is broken too."""
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Broken passes miss layers, and say so."""
    logger = logging.getLogger("inductor_x86q")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


CHECKS = [(name, check) for name in GRAPHS] + [
    (broken.graph, broken.check) for rows in BROKEN.values() for broken in rows if broken.check is not check
]


@pytest.mark.parametrize(("name", "checked"), [pytest.param(n, c, id=f"{n}: {c.__name__}") for n, c in CHECKS])
def test_unbroken(name: str, checked: Callable[[Graph], Any]) -> None:
    checked(GRAPHS[name])


@pytest.mark.parametrize(
    "broken", [pytest.param(b, id=f"{stage}: {b.name}") for stage, rows in BROKEN.items() for b in rows]
)
def test_broken(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broken.function, "__code__", broken_code(broken))
    with pytest.raises(Mismatch):
        broken.check(GRAPHS[broken.graph])


def test_each_pass_is_broken_in_five_ways() -> None:
    assert min(map(len, BROKEN.values())) >= 5
    assert {b.graph for rows in BROKEN.values() for b in rows} <= set(GRAPHS)
