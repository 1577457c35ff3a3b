"""Quantization-aware training: a small network for handwritten digits, in int8 and as accurate as in float32.

Trains a CNN of depthwise blocks on scikit-learn's 8×8 digits, quantizes it twice, once from observed ranges alone and
once with two epochs of quantization-aware training, and prints the accuracy of each compiled network on images that
none has seen. Needs scikit-learn; takes about a minute, half of it the C++ compiler's.

    python examples/qat_digits.py
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import inductor_x86q

MAX_LOSS = 0.5  # points of accuracy that int8 may lose to float32


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A depthwise and a pointwise convolution, as in MobileNet."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False), nn.BatchNorm2d(inputs),
        nn.ReLU6(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.Hardswish(),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = block(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        block(16, 32), Residual(32), block(32, 64, stride=2), Residual(64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10),
    )  # fmt: skip


def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (N, 1, 8, 8) from 0 to 1 and labels, to train on and to test on, in equal shares of each digit."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.3, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for x in split[:2])
    train_y, test_y = (torch.tensor(y) for y in split[2:])
    return train_x, train_y, test_x, test_y


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epochs: int, rate: float) -> None:
    """Trains in batches of 64; the learning rate falls from `rate` to 0."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        if step % (len(x) // 64) == 0:
            order = torch.randperm(len(x))
        picked = order[(step % (len(x) // 64)) * 64 :][:64]
        loss = nn.functional.cross_entropy(model(x[picked]), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of images whose digit is recognized, in percent."""
    with torch.inference_mode():
        return (model(x).argmax(1) == y).float().mean().item() * 100


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # images of 64 pixels are not worth sharing out
    train_x, train_y, test_x, test_y = load()

    model = network()
    train(model, train_x, train_y, epochs=12, rate=1e-2)
    model.eval()
    results = {"float32": accuracy(model, test_x, test_y)}

    calibrated = inductor_x86q.quantize(model, (test_x[:1],), calibration=train_x[:512].split(64))
    results["int8, calibrated (PTQ)"] = accuracy(
        torch.compile(calibrated, backend="inductor_x86q", options={"strict": True}), test_x, test_y
    )

    prepared = inductor_x86q.prepare_qat(copy.deepcopy(model).train(), (train_x[:64],))
    train(prepared, train_x, train_y, epochs=2, rate=3e-4)
    trained = inductor_x86q.convert(prepared)
    results["int8, trained (QAT)"] = accuracy(
        torch.compile(trained, backend="inductor_x86q", options={"strict": True}), test_x, test_y
    )

    print(inductor_x86q.explain(trained, (test_x,)))
    print(f"\naccuracy on {len(test_x)} images:")
    for name, percent in results.items():
        print(f"  {name:24}{percent:6.2f} %")
    loss = results["float32"] - results["int8, trained (QAT)"]
    if loss > MAX_LOSS:
        print(f"the trained int8 network loses {loss:.2f} points to float32, more than {MAX_LOSS}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
