"""Reads a report and fixes a layer that is not int8: a transposed convolution, for which there is no int8 kernel."""

import torch
from torch import nn

import inductor_x86q


def decoder(upsampling: nn.Module) -> nn.Module:
    """Twice as many pixels, between two convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), upsampling, nn.ReLU(), nn.Conv2d(32, 8, 1)).eval()


def report_of(model: nn.Module) -> inductor_x86q.Report:
    x = torch.randn(2, 16, 12, 12)
    q = inductor_x86q.quantize(model, (x,), calibration=[x])
    return inductor_x86q.explain(q, (x,))


before = report_of(decoder(nn.ConvTranspose2d(32, 32, 2, stride=2)))
print(before)
for miss in (*before.missed, *before.kept_float):
    print("not int8:", miss)

# The same size by copying pixels, which moves int8, and an ordinary convolution.
after = report_of(decoder(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(32, 32, 3, padding=1))))
print(after)
assert len(before.fused) == 3 and not before.kept_float
assert not after.missed and not after.kept_float and len(after.fused) == 3
