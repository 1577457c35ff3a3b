"""Reads a report and fixes a layer that is not int8: a convolution that may read padding only."""

import torch
from torch import nn

import inductor_x86q


def network(padding: int) -> nn.Module:
    """Three convolutions, the second with this padding."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=padding),
                         nn.ReLU(), nn.Conv2d(32, 8, 1)).eval()  # fmt: skip


def report_of(model: nn.Module) -> inductor_x86q.Report:
    x = torch.randn(2, 16, 12, 12)
    q = inductor_x86q.quantize(model, (x,), calibration=[x])
    return inductor_x86q.explain(q, (x,))


before = report_of(network(padding=3))
print(before)
for miss in (*before.missed, *before.kept_float):
    print("not int8:", miss)

# With less padding than the kernel reaches, every output reads a pixel of the image.
after = report_of(network(padding=1))
print(after)
assert len(before.kept_float) == 1 and len(before.fused) == 2
assert not after.missed and not after.kept_float and len(after.fused) == 3
