"""What the short examples share: drawn images of four patterns, and a small network that is trained on them in seconds."""

import torch
from torch import nn

PATTERNS = ("columns", "rows", "diagonals", "squares")


def images(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy patterns of 16×16 pixels, of any phase and contrast, and which pattern each is."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(PATTERNS), (count,), generator=random)
    phase = torch.randint(4, (count, 1, 1), generator=random)
    rows, columns = torch.arange(16).view(1, -1, 1), torch.arange(16).view(1, 1, -1)
    drawn = torch.stack([
        (columns + phase) // 2 % 2 + 0 * rows,
        (rows + phase) // 2 % 2 + 0 * columns,
        (rows + columns + phase) // 2 % 2,
        ((rows + phase) // 2 + (columns + phase) // 2) % 2,
    ])[labels, torch.arange(count)].float()  # fmt: skip
    contrast = 0.2 + torch.rand((count, 1, 1), generator=random)
    noise = torch.randn((count, 16, 16), generator=random)
    return (drawn * contrast + 0.45 * noise).unsqueeze(1), labels


def network() -> nn.Sequential:
    """Three convolutions and a linear, not trained."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    )


def train(model: nn.Module, steps: int = 60, rate: float = 2e-3) -> None:
    """An ordinary training loop, on new images at each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        batch, labels = images(64, seed=step + 1)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def trained() -> nn.Sequential:
    """The network, trained and in eval mode."""
    model = network()
    train(model)
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """The share of 1,000 images that it has not seen for which its answer is right."""
    batch, labels = images(1000, seed=999)
    with torch.no_grad():
        return float((model(batch).argmax(1) == labels).float().mean())
