"""A test that pins down what fuses into what: run it with `pytest examples/regression_test.py`."""

import torch

from inductor_x86q import testing


class Block(torch.nn.Module):
    """A quantized convolution by hand: activations of 0 to 127, so that the test holds on CPUs without VNNI too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = testing.QConv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(testing.quantize_dequantize(x)))


def test_conv_absorbs_relu() -> None:
    inputs = (torch.randn(1, 16, 8, 8),)
    q = testing.qdq_graph(Block(), inputs)
    code = testing.assert_fused(q, inputs, {"qconv": 1})  # needs no C++ compiler: about a second
    assert '"relu"' in code
    testing.assert_close_to_reference(q, inputs)  # compiles and runs
