"""The fastest code: kernels generated for each layer, and a package that has no Python to run."""

import tempfile
from pathlib import Path

import torch
from shapes import images, trained

import inductor_x86q
from inductor_x86q.testing import snr

model = trained()
x, _ = images(8)
q = inductor_x86q.quantize(model, (x,), calibration=[x])

report = inductor_x86q.explain(q, (x,), mode="max-autotune")
print(report)  # which layers have a kernel of this package to choose from, and why others have none
compiled = torch.compile(q, backend="inductor_x86q", mode="max-autotune")
with torch.no_grad():
    expected, result = q(x), compiled(x)

with tempfile.TemporaryDirectory() as directory:
    path = inductor_x86q.package(q, (x,), Path(directory) / "model.pt2", options={"max_autotune": True})
    print(f"{Path(path).stat().st_size / 1e6:.1f} MB")
    loaded = inductor_x86q.load(path)
    shipped = loaded(x)
for found in (result, shipped):
    assert snr(found, expected) > 30
