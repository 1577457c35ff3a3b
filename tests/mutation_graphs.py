"""Graphs of a few lines, each of which shows that a pass was broken in some way (test_mutations.py)."""

from __future__ import annotations

from tests.fuzz.graphs import Graph, written
from tests.test_random_graphs import FOUND

CONSTANTS = {
    "square": "integers(0, (8, 8), -63, 63, torch.int8)",
    "narrow": "integers(1, (5, 8), -63, 63, torch.int8)",
    "scales": "reals(2, (8,), 0.001, 0.01)",
    "zeros": "torch.zeros(8, dtype=torch.int64)",
    "threes": "torch.full((8,), 3)",
    "bias": "reals(3, (8,), -1.0, 1.0)",
    "kernel": "integers(4, (8, 8, 3, 3), -63, 63, torch.int8)",
    "pixel": "integers(5, (8, 8, 1, 1), -63, 63, torch.int8)",
    "cube": "integers(6, (8, 8, 1, 3, 3), -63, 63, torch.int8)",
    "scale": "torch.tensor(0.02)",
    "sixty": "torch.tensor(60)",
    "factors": "reals(7, (8,), -2.0, 2.0)",
    "of_channels": "reals(7, (8, 1, 1), -2.0, 2.0)",
    "of_rows": "reals(7, (8, 1), -2.0, 2.0)",
    "lowest": "torch.full((8, 8), -128, dtype=torch.int8)",
    "depthwise": "integers(8, (8, 1, 3, 3), -63, 63, torch.int8)",
    "left_half": "integers(9, (4, 4, 1, 1), -63, 63, torch.int8)",
    "right_half": "integers(10, (4, 4, 1, 1), -63, 63, torch.int8)",
    "steps": "integers(11, (1, 8, 8), -127, 127, torch.int8)",
    "step_scales": "reals(12, (1, 8), 1e-4, 2e-3)",
}
ROWS = {"x": "reals(SEED, (8, 8), -2.0, 2.0)"}
TWO_ROWS = {**ROWS, "z": "reals(SEED, (8, 8), -2.0, 2.0)"}
IMAGE = {"x": "reals(SEED, (1, 8, 5, 6), -2.0, 2.0)"}
VIDEO = {"x": "reals(SEED, (1, 8, 3, 5, 6), -2.0, 2.0)"}

W = "q.dequantize_per_channel(self.square, self.scales, self.zeros, {axis}, -127, 127, torch.int8)"
LINEAR = f"F.linear({{x}}, {W.format(axis=0)}, self.bias)"
CONVOLUTION = (
    "F.conv2d({x}, q.dequantize_per_channel(self.kernel, self.scales, self.zeros, 0, -127, 127, torch.int8), "
    "self.bias, 1, 1)"
)
U8 = "0.02, 60, 0, 127, torch.uint8"
OTHER = "0.05, 40, 0, 127, torch.uint8"
LATER = "0.06, 40, 0, 127, torch.uint8"  # another grid, else AOTAutograd makes one dequantize of two
NARROW = "0.02, 60, 40, 90, torch.uint8"


def qd(name: str, source: str, grid: str = U8) -> str:
    """`name` is `source` quantized and dequantized; its integers are called `name_i`."""
    return f"{name}_i = q.quantize_per_tensor({source}, {grid})\n{name} = q.dequantize_per_tensor({name}_i, {grid})"


def rows(*lines: str, inputs: dict[str, str] = ROWS, defects: str = "") -> Graph:
    return written("\n".join([qd("a", "x"), *lines]), CONSTANTS, inputs, defects=defects)


def image(*lines: str, defects: str = "") -> Graph:
    return rows(*lines, inputs=IMAGE, defects=defects)


LINEAR_16 = f"F.linear(a.to(torch.float16), {W.format(axis=0)}.to(torch.float16))"
LINEAR_BF16 = f"F.linear({{x}}.to(torch.bfloat16), {W.format(axis=0)}.to(torch.bfloat16))"
FLOAT = "torch.float32"
LINEAR_A, CONVOLUTION_A = LINEAR.format(x="a"), CONVOLUTION.format(x="a")
STEPS = (
    f"l = {LINEAR_A}",
    'r = torch.ops.inductor_x86q.recurrence("rnn_tanh", l[None], None, None, self.steps, self.step_scales, None, True)',
)

SCALED = "0.01, 0, -127, 127, torch.int8"  # a weight of one scale
PIXELS = f"F.conv2d({{x}}, q.dequantize_per_tensor(self.pixel, {SCALED}), self.bias)"
DEPTHWISE = f"F.conv2d({{x}}, q.dequantize_per_tensor(self.depthwise, {SCALED}), self.bias, 1, 1, 1, 8)"
HALVES = [f"F.conv2d({{x}}, q.dequantize_per_tensor(self.{name}, {SCALED}))" for name in ("left_half", "right_half")]
SHUFFLED = "s = {x}.reshape(1, 2, 4, 5, 6).transpose(1, 2).reshape(1, 8, 5, 6)"

GRAPHS = {
    "factor of each output": rows(f"b = {LINEAR_A}", "y = b * self.factors"),
    "factor of each channel": image(f"b = {CONVOLUTION_A}", "y = b * self.of_channels"),
    "factor of each row": rows(f"b = {LINEAR_A}", "y = b * self.of_rows"),
    "negative factor of the lowest weight": rows(
        "b = F.linear(a, q.dequantize_per_tensor(self.lowest, 0.01, 0, -128, 127, torch.int8))", "y = b * self.factors"),
    "factor behind a bias in bf16": FOUND["a factor behind a linear with a bias in bfloat16"],
    "wider factor": rows(f"b = {LINEAR_BF16.format(x='a')}", "y = b * self.factors"),

    "shuffled channels": image(f"b = {PIXELS.format(x='a')}", qd("c", "b", OTHER), SHUFFLED.format(x="c"),
                               f"y = {CONVOLUTION.format(x='s')}"),
    "shuffled channels of a depthwise convolution": image(
        f"b = {PIXELS.format(x='a')}", qd("c", "b", OTHER), SHUFFLED.format(x="c"), f"d = {DEPTHWISE.format(x='s')}",
        qd("e", "d", LATER), f"y = {CONVOLUTION.format(x='e')}"),
    "halves of shuffled channels": image(
        f"b = {PIXELS.format(x='a')}", qd("c", "b", OTHER), SHUFFLED.format(x="c"), "h = torch.chunk(s, 2, 1)",
        "l = h[0]", "r = h[1]", f"y = {HALVES[0].format(x='l')}", f"w = {HALVES[1].format(x='r')}", "return y, w"),
    "shuffled channels that show": image(
        f"b = {PIXELS.format(x='a')}", qd("c", "b", OTHER), SHUFFLED.format(x="c"), "h = torch.chunk(s, 2, 1)",
        "l = h[0]", "r = h[1]", f"y = {HALVES[0].format(x='l')}", "return y, r"),

    "scales as tensors": written(
        f"i = q.quantize_per_tensor(x, self.scale, self.sixty, 0, 127, torch.uint8)\n"
        f"a = q.dequantize_per_tensor(i, self.scale, self.sixty, 0, 127, torch.uint8)\ny = {LINEAR_A}",
        CONSTANTS, ROWS),
    "weight with one scale and a zero point": rows(
        "y = F.linear(a, q.dequantize_per_tensor(self.square, 0.01, 3, -127, 127, torch.int8), None)",
        defects="WEIGHT_TYPE"),
    "weight with zero points": rows(
        "y = F.linear(a, q.dequantize_per_channel(self.square, self.scales, self.threes, 0, -127, 127, torch.int8), None)",
        defects="WEIGHT_TYPE"),
    "slice of a weight": rows(f"y = F.linear(a, {W.format(axis=0)}[3:], None)"),
    "alpha of a product": rows(f"y = torch.addmm(self.bias, a, {W.format(axis=1)}, alpha=0.5)",
                               defects="NOT_QUANTIZED WEIGHT_NOT_QUANTIZED WEIGHT_TYPE"),
    "attention": rows(qd("b", "a", OTHER), "y = torch.ops.inductor_x86q.attention(a[None], b[None], a[None], None, False, 2.0)"),
    "causal attention": rows("y = torch.ops.inductor_x86q.attention(a[None], a[None], a[None], None, True, None)"),
    "quantized attention": rows("b = torch.ops.inductor_x86q.attention(a[None], a[None], a[None], None, False, None)",
                                qd("y", "b", OTHER)),
    "quantized steps": rows(*STEPS, "b = r[0]", qd("y", "b", OTHER)),
    "quantized steps in a narrow range": rows(*STEPS, "b = r[0]", qd("y", "b", NARROW)),
    "quantized steps that are read too": rows(*STEPS, "b = r[0]", qd("c", "b", OTHER), "y = b * 2.0", "return c, y"),
    "quantized states": rows(*STEPS, "b = r[1]", qd("y", "b", OTHER)),
    "product": rows(f"y = torch.mm(a, {W.format(axis=1)})"),
    "product with scales along its inputs": rows(f"y = torch.mm(a, {W.format(axis=0)})",
                                                 defects="NOT_QUANTIZED WEIGHT_NOT_QUANTIZED WEIGHT_TYPE"),
    "alpha of a bias": rows(f"y = torch.add(F.linear(a, {W.format(axis=0)}, None), self.bias, alpha=0.5)"),
    "clamp on one side": rows(f"b = {LINEAR_A}", "y = torch.clamp(b, min=-0.5)"),
    "gate of another": rows(f"b = {LINEAR_A}", "y = b * torch.sigmoid(a)"),
    "transposed linear": rows(f"b = {LINEAR_A}", "y = b.transpose(0, 1)"),

    "cat of two grids": rows(qd("b", "x", OTHER), "y = torch.cat([a, b], 0)"),
    "cat of two ranges": rows(qd("b", "x * 0.5", NARROW), "c = torch.cat([b, a], 0)", qd("y", "c", NARROW), "return y, c"),
    "pad with what lies between two integers": rows("y = F.pad(a, (1, 2), value=0.5078125)"),
    "pad": rows("b = F.pad(a, (1, 2))", qd("y", "b")),
    "relu of integers": rows("y = torch.relu(a)"),
    "narrower range": rows(qd("y", "a", NARROW)),
    "requantized": rows(qd("y", "a", OTHER)),
    "split to two grids": written(
        "\n".join(["s = torch.split(x, [3, 5], 0)", "a = s[0]", "b = s[1]", qd("c", "a"), qd("d", "b", OTHER),
                   "return c, d"]), CONSTANTS, ROWS),
    "rounded to bf16": written(
        "i = q.quantize_per_tensor(x, 0.013, 5, 0, 255, torch.uint8)\n"
        "a = q.dequantize_per_tensor(i, 0.013, 5, 0, 255, torch.uint8, out_dtype=torch.bfloat16)\n" + qd("y", "a", "0.013, 5, 0, 255, torch.uint8"),
        CONSTANTS, {"x": "reals(SEED, (8, 8), -0.1, 3.3)"}),

    "dequantized to bf16": rows("y = a.to(torch.bfloat16)"),
    "moved in bf16": rows("b = a.to(torch.bfloat16)", "y = b.transpose(0, 1)"),
    "rounded before a quantize": written("b = x.to(torch.bfloat16)\n" + qd("y", "b", "0.003, 5, 0, 255, torch.uint8"),
                                         CONSTANTS, {"x": "reals(SEED, (8, 8), -0.1, 0.8)"}),
    "cat of bf16 and fp32": rows("b = a.to(torch.bfloat16)", "y = torch.cat([b, a], 0)"),
    "linear in fp16": rows(f"y = {LINEAR_16}"),
    "residual in fp16": rows(f"b = {LINEAR_16}", "c = b + z.to(torch.float16)", qd("y", "c"), inputs=TWO_ROWS),

    "convolution": image(f"y = {CONVOLUTION_A}"),
    "dilated convolution": image(f"y = {CONVOLUTION_A.replace('1, 1)', '1, 1, 2)')}"),
    "convolution with scales along its inputs": image(
        f"y = {CONVOLUTION_A.replace('zeros, 0', 'zeros, 1')}", defects="WEIGHT_TYPE"),
    "convolution to int8": image(f"b = {CONVOLUTION_A}", qd("y", "b", OTHER)),
    "signed convolution": written(qd("a", "x", "0.02, 5, -60, 61, torch.int8") + f"\ny = {CONVOLUTION_A}", CONSTANTS,
                                  IMAGE, defects="ACTIVATION_TYPE"),
    "linear": rows(f"y = {LINEAR_A}"),
    "linear to int8": rows(f"b = {LINEAR_A}", qd("y", "b", OTHER)),
    "linear to the other int8": rows(f"b = {LINEAR_A}", qd("y", "b", "0.03, 5, -60, 61, torch.int8")),
    "linear to a narrow range": rows(f"b = {LINEAR_A}", qd("y", "b", NARROW)),

    "relu": rows(f"b = {LINEAR_A}", "y = torch.relu(b)"),
    "relu in front of an addition": rows(f"b = torch.relu({LINEAR_A})", "y = b + z", inputs=TWO_ROWS),
    "relu in front of a quantize": written(
        qd("a", "x") + "\nb = F.conv3d(a, q.dequantize_per_channel(self.cube, self.scales, self.zeros, 0, -127, 127, "
        "torch.int8), self.bias)\nc = torch.relu(b)\n" + qd("y", "c"), CONSTANTS, VIDEO),
    "hardtanh of relu": rows(f"b = torch.relu({LINEAR_A})", "y = F.hardtanh(b, -1.0, 0.5)"),
    "addition with alpha": rows(f"b = {LINEAR_A}", "y = torch.add(b, z, alpha=0.5)", inputs=TWO_ROWS),
    "residual": rows(qd("b", "z", OTHER), f"c = {LINEAR_A}", "d = c + b", qd("y", "d", "0.04, 50, 0, 127, torch.uint8"),
                     inputs=TWO_ROWS),
    "residual of the other int8": rows(
        qd("b", "z", "0.05, 4, -60, 61, torch.int8"), f"c = {LINEAR_A}", "d = c + b", qd("y", "d"), inputs=TWO_ROWS),

    "float weight": rows("y = F.linear(x, q.dequantize_per_channel(self.square, self.scales, self.zeros, 0, -127, 127, "
                         "torch.int8), None)", defects="ACTIVATION_NOT_QUANTIZED"),
    "gelu of a convolution": image(f"b = {CONVOLUTION_A}", 'y = F.gelu(b * 3.0, approximate="tanh")'),
    "leaky relu of a convolution": image(f"b = {CONVOLUTION_A}", "y = F.leaky_relu(b, 0.3)"),
    "hardtanh of floats": rows("y = F.hardtanh(x, -0.5, 1.5)"),
    "weight of a transposed convolution": image(
        "y = F.conv_transpose2d(a, q.dequantize_per_channel(self.kernel, self.scales, self.zeros, 1, -127, 127, "
        "torch.int8), None, 3, 0, 1)", defects="NO_KERNEL"),  # the last outputs read padding only

    "max pool, ceil mode": image("y = F.max_pool2d(a, 3, 2, ceil_mode=True)"),
    "max pool, padding and dilation": image("y = F.max_pool2d(a, 3, 2, 1, 2)"),
    "max pool of signed": written(
        qd("a", "x", "0.02, 5, -60, 61, torch.int8") + "\ny = F.max_pool2d(a, 2)", CONSTANTS, IMAGE),
    "large max pool of signed": written(
        "b = x.permute(0, 4, 1, 2, 3)\n" + qd("a", "b", "0.02, 5, -60, 61, torch.int8")
        + "\ny = F.max_pool3d(a, 3, 1, 1)", CONSTANTS, {"x": "reals(SEED, (1, 5, 6, 7, 8), -2.0, 2.0)"}),
    "average pool of columns": image("y = F.avg_pool2d(a, (5, 2), 1)"),
    "average pool with a divisor": image("y = F.avg_pool2d(a, (5, 6), 1, divisor_override=7)"),
    "padded average pool": image("y = F.avg_pool2d(a, (5, 6), 1, (1, 2))"),
    "max pool of frames": written(qd("a", "x") + "\ny = F.max_pool3d(a, (2, 1, 1), 1)", CONSTANTS, VIDEO),

    "rounded result of a sum's accumulator": rows(
        f"b = {LINEAR_BF16.format(x='a')}", f"c = b.to({FLOAT})", qd("d", "c", OTHER),
        f"e = torch.relu(b + {LINEAR_BF16.format(x='d')})", "f = c * 2.0", "return e, f"),
    "rounded to fp16 by the graph": rows(f"b = {LINEAR_A}", "c = b.to(torch.float16)", f"y = c.to({FLOAT})"),

    "accumulator read later": rows(qd("b", "z", OTHER), f"c = {LINEAR_A}", "d = c + b", qd("e", "d"),
                                   f"f = q.dequantize_per_tensor(b_i, {LATER})", "return e, f", inputs=TWO_ROWS),
    "accumulator is an input": written(
        qd("a", "x") + f"\nb = q.dequantize_per_tensor(z, {OTHER})\nc = {LINEAR_A}\nd = c + b\n" + qd("y", "d"),
        CONSTANTS, {**ROWS, "z": "integers(SEED, (8, 8), 0, 127, torch.uint8)"}),
    "accumulator is expanded": written(
        "\n".join([qd("a", "x"), f"b_i = q.quantize_per_tensor(z, {OTHER}).expand(8, 8)",
                   f"b = q.dequantize_per_tensor(b_i, {OTHER})", f"c = {LINEAR_A}", "d = c + b", qd("y", "d")]),
        CONSTANTS, {**ROWS, "z": "reals(SEED, (8, 1), -2.0, 2.0)"}),
    "accumulator is a view of what is read later": written(
        "\n".join([qd("a", "x"), f"w = q.quantize_per_tensor(z, {OTHER})", "v = w.reshape(8, 8)",
                   f"b = q.dequantize_per_tensor(v, {OTHER})", f"c = {LINEAR_A}", "d = c + b", qd("e", "d"),
                   f"f = q.dequantize_per_tensor(w, {OTHER})", "return e, f"]),
        CONSTANTS, {**ROWS, "z": "reals(SEED, (4, 16), -2.0, 2.0)"}),
    "accumulator is a part of what is read later": written(
        "\n".join([qd("a", "x"), f"w = q.quantize_per_tensor(z, {OTHER})", "s = torch.split(w, [8, 8], 0)", "b_i = s[0]",
                   f"b = q.dequantize_per_tensor(b_i, {OTHER})", f"c = {LINEAR_A}", "d = c + b", qd("e", "d"),
                   f"f = q.dequantize_per_tensor(w, {LATER})", "return e, f"]),
        CONSTANTS, {**ROWS, "z": "reals(SEED, (16, 8), -2.0, 2.0)"}),
    "a view of the accumulator is read later": written(
        "\n".join([f"w = q.quantize_per_tensor(z, {OTHER})", "v = w.reshape(4, 16)",
                   f"u = q.dequantize_per_tensor(v, {OTHER})", "t = u * 0.5", "s = t.reshape(8, 8)", qd("a", "s"),
                   f"b = q.dequantize_per_tensor(w, {OTHER})", f"c = {LINEAR_A}", "d = c + b", qd("e", "d"),
                   f"f = q.dequantize_per_tensor(v, {LATER})", "return e, f"]), CONSTANTS, {"z": "reals(SEED, (8, 8), -2.0, 2.0)"}),
    "accumulator is the input": rows(f"b = {LINEAR_A}", "c = b + a", qd("y", "c")),
}  # fmt: skip
