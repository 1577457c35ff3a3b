"""Calibration: the ranges of the activations come from the data that you give. Compares good data with bad."""

import torch
from shapes import accuracy, images, trained

import inductor_x86q
from inductor_x86q.testing import snr

model = trained()
x, _ = images(8)
typical = [images(16, seed=100 + batch)[0] for batch in range(4)]
choices = {
    "64 typical images": typical,
    "one typical image": [x[:1]],
    "images that are too dark": [batch * 0.1 for batch in typical],
    "random numbers, 50 times too large": [50 * torch.randn(16, 1, 16, 16)],
}

with torch.no_grad():
    reference = model(typical[0])
print(f"{'float32':36s} accuracy {accuracy(model):.1%}")
found = {}
for name, calibration in choices.items():
    q = inductor_x86q.quantize(model, (x,), calibration=calibration)
    with torch.no_grad():
        found[name] = snr(q(typical[0]), reference)
    print(f"{name:36s} accuracy {accuracy(q):.1%}, {found[name]:.1f} dB from float32")

assert max(found, key=found.__getitem__) == "64 typical images"
assert found["64 typical images"] > 20
