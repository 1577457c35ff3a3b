"""Finds the layer that costs the accuracy, and keeps it in float."""

import torch
from shapes import images, trained

import inductor_x86q
from inductor_x86q.testing import snr

model = trained()
with torch.no_grad():  # one weight that is far larger than the others of its channel, as happens in trained networks
    model.get_parameter("3.weight")[:, 0, 0, 0] = 6.0
batches = [images(16, seed=100 + batch)[0] for batch in range(4)]
x = batches[0]
with torch.no_grad():
    reference = model(x)

q = inductor_x86q.quantize(model, (x,), calibration=batches)
report = inductor_x86q.explain(q, (x,), drift=model)
assert report.drift is not None
print(report.drift)
worst = report.drift.layers[0]

excluded = inductor_x86q.quantize(model, (x,), calibration=batches, exclude=[worst.layer])
with torch.no_grad():
    before, after = snr(q(x), reference), snr(excluded(x), reference)
print(f"all layers int8: {before:.1f} dB from float32; without {worst.layer}: {after:.1f} dB")
assert after > before
