"""A few hundred random graphs, always the same ones, against what they may compute; and every bug that others found.

`python -m tests.fuzz --minutes N --seed S` checks more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from inductor_x86q import cpu
from inductor_x86q.inductor import uncompiled
from tests.fuzz import campaign
from tests.fuzz.check import Mismatch, check, check_together
from tests.fuzz.drawing import graphs
from tests.fuzz.graphs import Graph, written

SEEDS, GRAPHS = range(5), 40


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Misses are checked here, so they need not be logged; one thread, since the tensors are tiny."""
    logger, threads = logging.getLogger("inductor_x86q"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


def failures(seed: int, count: int, *, compile_every: int = 0, mode: str | None = None) -> str:
    tally = campaign.Tally()
    for _ in campaign.run(seed, count, tally, compile_every=compile_every, mode=mode):
        pass
    assert tally.graphs == count and tally.kernels
    assert bool(tally.own_kernels) is bool(cpu.int8_lanes())
    return "\n\n".join(message for message, _ in tally.failures)


@pytest.mark.parametrize("seed", SEEDS)
def test_fused_graphs(seed: int) -> None:
    problems = failures(seed, GRAPHS)
    assert not problems, problems


@pytest.mark.parametrize("seed", [100, 101, *(pytest.param(n, marks=pytest.mark.slow) for n in range(102, 108))])
def test_compiled_graphs(seed: int) -> None:
    """Through generated and compiled C++, several graphs to a compile."""
    problems = failures(seed, campaign.TOGETHER, compile_every=1)
    assert not problems, problems


@given(graph=graphs())
@settings(max_examples=5, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_graphs_that_hypothesis_draws(graph: Graph) -> None:
    check(graph)


def test_same_seed_same_graphs() -> None:
    assert campaign.draw(3, 10) == campaign.draw(3, 10) != campaign.draw(4, 10)


# --- what random graphs found -----------------------------------------------------------------------------------------


PER_TENSOR = "q.dequantize_per_tensor(self.c0, 0.01, 0, -127, 127, torch.int8)"
PER_CHANNEL = "q.dequantize_per_channel(self.c0, self.c1, self.c2, {axis}, -127, 127, torch.int8)"
QUANTIZE = """
    a = q.quantize_per_tensor(x, 0.02, 60, 0, 127, torch.uint8)
    b = q.dequantize_per_tensor(a, 0.02, 60, 0, 127, torch.uint8)
"""
MATRIX = {
    "c0": "integers(0, (6, 5), -64, 64, torch.int8)",
    "c1": "reals(1, (5,), 0.001, 0.01)",
    "c2": "torch.zeros(5, dtype=torch.int64)",
}
ROWS = {"x": "reals(SEED, (3, 6), -2.0, 2.0)"}

FOUND = {
    "a weight expanded to an empty batch": written(
        QUANTIZE + f"y = torch.bmm(b, {PER_CHANNEL.format(axis=1)}.expand(b.shape[0], 6, 5))",
        MATRIX, {"x": "reals(SEED, (0, 3, 6), -2.0, 2.0)"}, defects="NO_KERNEL"),
    "a weight expanded to a batch that is not known when compiling": written(
        QUANTIZE + f"y = torch.bmm(b, {PER_CHANNEL.format(axis=1)}.expand(b.shape[0], 6, 5))",
        MATRIX, {"x": "reals(SEED, (2, 3, 6), -2.0, 2.0)"}, dynamic_batch=True),
    "a linear of permuted rows in an open batch": written(
        """b = x.permute(0, 3, 1, 2)
        c = q.quantize_per_tensor(b, 0.02, 60, 0, 127, torch.uint8)
        a = q.dequantize_per_tensor(c, 0.02, 60, 0, 127, torch.uint8)
        y = F.linear(a, q.dequantize_per_channel(self.c0, self.c1, self.c2, 0, -127, 127, torch.int8))""",
        {"c0": "integers(0, (16, 5), -64, 64, torch.int8)", "c1": "reals(1, (16,), 0.001, 0.01)",
         "c2": "torch.zeros(16, dtype=torch.int64)"},
        {"x": "reals(SEED, (2, 4, 5, 3), -2.0, 2.0)"}, dynamic_batch=True),
    "two quantized activations multiplied": written(
        QUANTIZE + "y = torch.bmm(b, b.transpose(1, 2))", {}, {"x": "reals(SEED, (2, 3, 6), -2.0, 2.0)"},
        defects="NO_KERNEL"),
    "a bias of one element": written(
        QUANTIZE + f"y = torch.addmm(self.c3, b, {PER_CHANNEL.format(axis=1)})", {**MATRIX, "c3": "reals(3, (1,), -1, 1)"},
        ROWS),
    "a weight with scales along its inputs": written(
        QUANTIZE + f"y = torch.mm(b, {PER_CHANNEL.format(axis=0)})",
        {**MATRIX, "c1": "reals(1, (6,), 0.001, 0.01)", "c2": "torch.zeros(6, dtype=torch.int64)"}, ROWS,
        defects="NOT_QUANTIZED WEIGHT_NOT_QUANTIZED WEIGHT_TYPE"),
    "a signed input of a convolution": written(
        f"""a = q.quantize_per_tensor(x, 0.02, 5, -60, 61, torch.int8)
        b = q.dequantize_per_tensor(a, 0.02, 5, -60, 61, torch.int8)
        y = F.conv2d(b, {PER_TENSOR}, None, 1, 1)""",
        {"c0": "integers(0, (5, 2, 3, 3), -60, 60, torch.int8)"}, {"x": "reals(SEED, (1, 2, 4, 3), -2.0, 2.0)"},
        defects="ACTIVATION_TYPE"),
    "a zero point above the range, in the padding": written(
        f"""a = q.quantize_per_tensor(x, 0.02, 200, 0, 127, torch.uint8)
        b = q.dequantize_per_tensor(a, 0.02, 200, 0, 127, torch.uint8)
        y = F.conv2d(b, {PER_TENSOR}, None, 1, 1)""",
        {"c0": "integers(0, (5, 2, 3, 3), -127, 127, torch.int8)"}, {"x": "reals(SEED, (1, 2, 4, 3), -2.0, 2.0)"},
        defects="SATURATES"),
    "an empty image": written(
        QUANTIZE + f"y = F.conv2d(b, {PER_TENSOR}, None, 1, 1)",
        {"c0": "integers(0, (5, 2, 3, 3), -127, 127, torch.int8)"}, {"x": "reals(SEED, (0, 2, 4, 3), -2.0, 2.0)"},
        defects="NO_KERNEL"),
}  # fmt: skip


FOUND["a convolution of an int8 input of the graph"] = written(
    f"""a = q.dequantize_per_tensor(x, 0.02, 60, 0, 127, torch.uint8)
    y = F.conv2d(a, {PER_TENSOR}, None, 1, 1)""",
    {"c0": "integers(0, (2, 2, 3, 3), -60, 60, torch.int8)"},
    {"x": "integers(SEED, (1, 2, 4, 3), 0, 127, torch.uint8)"})  # fmt: skip
FOUND["a uint8 product added to int8"] = written(
    f"""i = q.quantize_per_tensor(x, 0.02, 60, 0, 127, torch.uint8)
    a = q.dequantize_per_tensor(i, 0.02, 60, 0, 127, torch.uint8)
    j = q.quantize_per_tensor(z, 0.03, 4, -60, 61, torch.int8)
    b = q.dequantize_per_tensor(j, 0.03, 4, -60, 61, torch.int8)
    c = F.conv2d(a, {PER_TENSOR}, None, 1, 1)
    d = c + b
    e = q.quantize_per_tensor(d, 0.04, 4, -60, 61, torch.int8)
    y = q.dequantize_per_tensor(e, 0.04, 4, -60, 61, torch.int8)""",
    {"c0": "integers(0, (2, 2, 3, 3), -60, 60, torch.int8)"},
    {name: "reals(SEED, (1, 2, 4, 3), -2.0, 2.0)" for name in "xz"})  # fmt: skip

HALF = f"F.{{}}(b.to({{}}), {PER_TENSOR}.to({{}}))"
MATRIX_16 = {"c0": "integers(0, (6, 6), -64, 64, torch.int8)"}
FOUND |= {
    "a convolution in float16, which no kernel gives": written(
        QUANTIZE + f"y = {HALF.format('conv2d', *['torch.float16'] * 2)}",
        {"c0": "integers(0, (5, 2, 3, 3), -60, 60, torch.int8)"}, {"x": "reals(SEED, (1, 2, 4, 3), -2.0, 2.0)"}),
    "channels in an order computed at run time": written(
        f"""{QUANTIZE.strip()}
        c = F.conv2d(b, {PER_TENSOR})
        d = torch.roll(c, 1, 1)
        e = q.quantize_per_tensor(d, 0.02, 60, 0, 127, torch.uint8)
        y = q.dequantize_per_tensor(e, 0.02, 60, 0, 127, torch.uint8)""",
        {"c0": "integers(0, (5, 2, 3, 3), -60, 60, torch.int8)"}, {"x": "reals(SEED, (1, 2, 4, 3), -2.0, 2.0)"}),
    "a factor in float32 of a linear in bfloat16": written(
        f"""{QUANTIZE.strip()}
        c = {HALF.format('linear', 'torch.bfloat16', 'torch.bfloat16')}
        y = c * self.c1""",
        MATRIX_16 | {"c1": "reals(1, (6,), -1.0, 1.0)"}, {"x": "reals(SEED, (3, 6), -2.0, 2.0)"}),
    "channels numbered from the end": written(
        f"""{QUANTIZE.strip()}
        c = F.conv2d(b, {PER_TENSOR})
        d = q.quantize_per_tensor(c, 0.02, 60, 0, 127, torch.uint8)
        e = d[:, self.c1]
        y = q.dequantize_per_tensor(e, 0.02, 60, 0, 127, torch.uint8)""",
        {"c0": "integers(0, (5, 2, 3, 3), -60, 60, torch.int8)", "c1": "torch.tensor([-1, 0, 3, 1])"},
        {"x": "reals(SEED, (1, 2, 4, 3), -2.0, 2.0)"}),
    "a linear that adds an image whose channels lie innermost": written(
        f"""{QUANTIZE.strip()}
        c = (z * 0.5).contiguous(memory_format=torch.channels_last)
        d = F.linear(b, {PER_TENSOR})
        y = d + c
        return y, c""",
        MATRIX_16, {name: "reals(SEED, (2, 4, 3, 6), -2.0, 2.0)" for name in "xz"}),
} | {
    f"a linear whose {dtype} sum is quantized": written(
        f"""{QUANTIZE.strip()}
        c = {HALF.format('linear', dtype, dtype)}
        d = torch.relu(c + z.to({dtype}))
        e = q.quantize_per_tensor(d, 0.02, 0, 0, 255, torch.uint8)
        y = q.dequantize_per_tensor(e, 0.02, 0, 0, 255, torch.uint8)""",
        MATRIX_16, {name: "reals(SEED, (3, 6), -2.0, 2.0)" for name in "xz"})
    for dtype in ("torch.bfloat16", "torch.float16")
}  # fmt: skip

# The library's kernels for AVX-512 with VNNI get these wrong; they stay float on every CPU.
for name, image, weight, geometry in (
    ("an output that reads padding only", (3, 16, 5, 5), (32, 16, 3, 3), "2, 3, 1, 1"),
    ("an output between two taps that both read padding", (2, 8, 1, 5), (17, 8, 2, 1), "1, (1, 0), (2, 1), 1"),
    ("one input and 17 outputs of each group", (2, 4, 9, 9), (68, 1, 3, 3), "1, 1, 1, 4"),
):
    FOUND[name] = written(
        QUANTIZE + f"y = F.conv2d(b, q.dequantize_per_tensor(self.c0, 0.01, 0, -127, 127, torch.int8), None, {geometry})",
        {"c0": f"integers(0, {weight}, -64, 64, torch.int8)"}, {"x": f"reals(SEED, {image}, -2.0, 2.0)"},
        defects="NO_KERNEL")  # fmt: skip
# Wrong in float32, too.
FOUND["one input channel, a stride, one column of outputs"] = written(
    QUANTIZE + f"y = F.conv2d(b, {PER_TENSOR}, None, (1, 3), (0, 1)) + F.conv2d(x, self.c1, None, (1, 3), (0, 1))",
    {"c0": "integers(0, (17, 1, 5, 5), -64, 64, torch.int8)", "c1": "reals(1, (17, 1, 5, 5), -1.0, 1.0)"},
    {"x": "reals(SEED, (2, 1, 9, 5), -2.0, 2.0)"},
    defects="NOT_QUANTIZED",
)
FOUND["a linear of flipped rows"] = written(
    QUANTIZE + f"y = F.linear(torch.flip(b, (0,)), {PER_TENSOR})", MATRIX_16, {"x": "reals(SEED, (3, 6), -2.0, 2.0)"}
)

FOUND["a factor behind a linear with a bias in bfloat16"] = written(
    f"""{QUANTIZE.strip()}
    c = F.linear(b.to(torch.bfloat16), {PER_TENSOR}.to(torch.bfloat16), self.c1)
    y = c * self.c2""",
    {"c0": "integers(0, (64, 6), -60, 60, torch.int8)", "c1": "reals(1, (64,), -1.0, 1.0).to(torch.bfloat16)",
     "c2": "torch.full((1,), 0.3).to(torch.bfloat16)"},
    {"x": "reals(SEED, (48, 6), -2.0, 2.0)"})  # fmt: skip

# These need Inductor's lowering to fail.
FOUND_COMPILED = {
    f"{source} in, {target} out": written(
        f"""a = q.quantize_per_tensor(x, 0.02, 60, 0, 127, torch.{source})
        b = q.dequantize_per_tensor(a, 0.02, 60, 0, 127, torch.{source})
        c = F.linear(b, {PER_TENSOR}, None)
        d = q.quantize_per_tensor(c, 0.03, -9 + {shift}, -60 + {shift}, 61 + {shift}, torch.{target})
        y = q.dequantize_per_tensor(d, 0.03, -9 + {shift}, -60 + {shift}, 61 + {shift}, torch.{target})""",
        {"c0": "integers(0, (7, 6), -60, 60, torch.int8)"}, ROWS)
    for source, target, shift in (("uint8", "int8", 0), ("int8", "uint8", 60))
}  # fmt: skip


# The library's int8 pool, of images whose channels do not lie innermost.
FOUND_COMPILED |= {
    f"max pool of {len(size)} dimensions": written(
        QUANTIZE + f"y = F.max_pool{len(size) - 2}d(b, 2)", {}, {"x": f"reals(SEED, {size}, -2.0, 2.0)"})
    for size in ((2, 8, 6, 5), (1, 8, 4, 3, 2))
}  # fmt: skip


FOUND_COMPILED |= {
    f"a 1-D convolution and {name}": written(
        QUANTIZE + f"c = F.conv1d(b, {PER_TENSOR}, None, 1, 1)\n{tail}",
        {"c0": "integers(0, (4, 3, 3), -60, 60, torch.int8)"},
        {"x": "reals(SEED, (2, 3, 7), -2.0, 2.0)", "z": "reals(SEED, (2, 4, 7), -2.0, 2.0)"})
    for name, tail in {"cat": "y = torch.cat([c, z], 1)", "addition": "y = torch.relu(c + z)",
                       "split": "d = torch.split(c, [4, 3], 2)\ny = d[1] + 1.0\nu = z * 2.0\nreturn y, u"}.items()
}  # fmt: skip
FOUND_COMPILED["a quantize of float16"] = written(
    QUANTIZE, {}, {"x": "reals(SEED, (3, 6), -2.0, 2.0).to(torch.float16)"})  # fmt: skip
FOUND_COMPILED["an input in bfloat16, added to a linear"] = written(
    QUANTIZE + f"c = {HALF.format('linear', *['torch.bfloat16'] * 2)}\n y = c + z", MATRIX_16,
    {"x": "reals(SEED, (3, 6), -2.0, 2.0)", "z": "reals(SEED, (3, 6), -2.0, 2.0).to(torch.bfloat16)"})  # fmt: skip


PLAIN, WIDE = "0.02, 0, 0, 127, torch.uint8", "torch.uint8, out_dtype=torch.bfloat16"
FOUND_COMPILED["a linear in bfloat16, read in float32 behind a sum into it"] = written(
    f"""a = q.dequantize_per_tensor(q.quantize_per_tensor(x, {PLAIN}), {PLAIN}, out_dtype=torch.bfloat16)
    b = F.linear(a, {PER_TENSOR}.to(torch.bfloat16))
    c = b.to(torch.float32)
    d = q.dequantize_per_tensor(q.quantize_per_tensor(c, 0.05, 60, 0, 127, torch.uint8), 0.05, 60, 0, 127, {WIDE})
    y = torch.relu(b + F.linear(d, {PER_TENSOR.replace("c0", "c1")}.to(torch.bfloat16)))
    e = torch.chunk(c, 2, 0)
    f = q.dequantize_per_tensor(q.quantize_per_tensor(e[0], 0.3, 0, 0, 127, torch.uint8), 0.3, 0, 0, 127, {WIDE})
    g = q.dequantize_per_tensor(q.quantize_per_tensor(e[1], {PLAIN}), {PLAIN})
    h = F.linear(g.to(torch.bfloat16), {PER_TENSOR}.to(torch.bfloat16))
    return y, f, h""",
    {f"c{n}": f"integers({n}, (6, 6), 1, 63, torch.int8)" for n in (0, 1)}, {"x": "reals(SEED, (2, 6), 0.0, 2.0)"})  # fmt: skip
FOUND_COMPILED["a view of a convolved line"] = written(
    f"""{QUANTIZE.strip()}
    c = F.conv1d(b, {PER_TENSOR}, None, 2)
    d = q.quantize_per_tensor(c, 0.02, 60, 0, 127, torch.uint8)
    e = q.dequantize_per_tensor(d, 0.02, 60, 0, 127, torch.uint8)
    y = F.linear(e, {PER_TENSOR.replace("c0", "c1")})""",
    {"c0": "integers(0, (1, 13, 3), -60, 60, torch.int8)", "c1": "integers(1, (5, 5), -60, 60, torch.int8)"},
    {"x": "reals(SEED, (2, 13, 11), -2.0, 2.0)"})  # fmt: skip


@pytest.mark.parametrize("parameters", ["0.02, self.c1", "self.c2, 60"])
def test_a_number_and_a_tensor_as_parameters(parameters: str) -> None:
    """Dynamo traces no such dequantize; it breaks the graph, and the reason says that it may have done so."""
    graph = written(
        f"""a = q.quantize_per_tensor(x, 0.02, 60, 0, 127, torch.uint8)
        b = q.dequantize_per_tensor(a, {parameters}, 0, 127, torch.uint8)
        y = F.linear(torch.flip(b, (0,)), {PER_TENSOR})""",
        MATRIX_16 | {"c1": "torch.tensor(60)", "c2": "torch.tensor(0.02)"}, ROWS, defects="ACTIVATION_NOT_QUANTIZED")  # fmt: skip
    report = check(graph)
    assert [miss.reason.name for miss in report.missed] == ["ACTIVATION_NOT_QUANTIZED"]
    assert "torch.compile broke the graph in between, and TORCH_LOGS=graph_breaks" in str(report.missed[0])


@pytest.mark.parametrize("seed", [200, *(pytest.param(n, marks=pytest.mark.slow) for n in (201, 202))])
def test_graphs_of_generated_kernels(seed: int) -> None:
    """As above, every layer by a kernel of ours that there is one for."""
    problems = failures(seed, 10, compile_every=1, mode="max-autotune")
    assert not problems, problems


FACTORS = {"of equal numbers": "self.c1", "of one number": "self.c2", "a number": "0.5", "a negative number": "-2"}


@pytest.mark.parametrize("shape", [(1, 2, 4, 3), (3, 6)], ids=["convolution", "linear"])
@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_that_is_the_same_for_all_channels(name: str, shape: tuple[int, ...]) -> None:
    """The layer takes it up as it does others, and gives int8."""
    layer, channels = ("conv2d", "(6, 1, 1)") if len(shape) == 4 else ("linear", "(6,)")
    weight = "(6, 2, 3, 3)" if len(shape) == 4 else "(6, 6)"
    graph = written(
        f"""{QUANTIZE.strip()}
        c = F.{layer}(b, {PER_TENSOR}, self.c3)
        d = c * {FACTORS[name]}
        y = q.quantize_per_tensor(d, 0.02, 60, 0, 255, torch.uint8)""",
        {"c0": f"integers(0, {weight}, -60, 60, torch.int8)", "c1": f"torch.full({channels}, 0.5)",
         "c2": "torch.tensor([0.5])", "c3": "reals(3, (6,), -1.0, 1.0)"},
        {"x": f"reals(SEED, {shape}, -2.0, 2.0)"})  # fmt: skip
    report = check(graph)
    assert [(fusion.absorbed, fusion.output_dtype) for fusion in report.fused] == [(("quantize",), "uint8")]
    assert len(report.quantizes_left) == 1


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    check(FOUND[name])


def test_found_in_compiled_code() -> None:
    check_together(list(FOUND_COMPILED.values()), generate=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_uncompiled_run_lays_out_what_a_convolution_adds_to(layout: torch.memory_format, shared: bool) -> None:
    """One that lies otherwise is converted; the sum is written into its memory unless the convolution reads that."""
    scale, zero = torch.full((2,), 0.01), torch.zeros(2, dtype=torch.int32)
    weight = torch.randint(-60, 60, (2, 2, 3, 3), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    onednn, geometry = torch.ops.onednn, ([1, 1], [1, 1], [1, 1], 1)
    packed = onednn.qconv_prepack(weight, scale, 0.02, 60, *geometry, [1, 2, 5, 5])
    graph = torch.fx.Graph()
    x, accumulator = graph.placeholder("x"), graph.placeholder("accumulator")
    constants = {"packed": packed, "scale": scale, "zero": zero}
    nodes = {name: graph.get_attr(name) for name in constants}
    arguments = (x, 0.02, 60, *nodes.values(), accumulator, None, *geometry, 0.03, 50, torch.uint8, 0.02, 60, "sum", 1.0,
                 "none", [], "")  # fmt: skip
    graph.output(graph.call_function(onednn.qconv2d_pointwise.binary, arguments))
    run = uncompiled.run_uncompiled(torch.fx.GraphModule(constants, graph), [])

    image = torch.randint(0, 127, (1, 2, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    given = image.clone(memory_format=layout)
    if shared and layout is torch.channels_last:
        with pytest.raises(RuntimeError, match="its own input"):
            run([given, given])
        return
    result = run([given if shared else image, given])
    last = image.clone(memory_format=torch.channels_last)
    values = [last, 0.02, 60, packed, scale, zero, last.clone(), *arguments[7:]]
    assert torch.equal(result, onednn.qconv2d_pointwise.binary(*values))
    assert torch.equal(given, image if shared else result)


def test_a_failure_is_made_small_and_printed_as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself is checked: with relu forgotten it fails, and the message can be run."""
    from inductor_x86q.passes.fuse import post_ops

    monkeypatch.setattr(post_ops, "spelled", lambda node: post_ops.Unary("none"))
    wrong = written(QUANTIZE + f"c = F.linear(b, {PER_TENSOR})\n d = torch.relu(c)\n y = d + 1.0",
                  {"c0": "integers(0, (7, 6), -127, 127, torch.int8)"}, ROWS)  # fmt: skip
    with pytest.raises(Mismatch, match="outside what the graph allows") as caught:
        check_together([wrong], generate=False)
    message, smaller = campaign.explained(wrong, caught.value)
    assert any("torch.relu" in line for line in smaller.lines)
    program = message[message.index("import torch") :]
    compile(program, "program", "exec")
    assert 'backend="inductor_x86q"' in program
