"""A text encoder without calibration data: each row gets a scale of its own, and one compile serves all lengths."""

import torch
from torch import nn

import inductor_x86q
from inductor_x86q.testing import snr


class Encoder(nn.Module):
    """One layer of a transformer over token numbers, and the mean over the tokens."""

    def __init__(self, words: int = 100, size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.project, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.feed_forward = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embedding(tokens)
        query, key, value = self.project(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(query, key, value))
        x = x + self.feed_forward(self.norm(x))
        return x.mean(1)


torch.manual_seed(0)
model = Encoder().eval()
tokens = torch.randint(100, (2, 12))
sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}  # sentences and tokens

q = inductor_x86q.quantize(model, (tokens,), dynamic="per_token", dynamic_shapes=(sizes,))
report = inductor_x86q.explain(q, (tokens,))
print(report)
assert len(report.fused) == 5 and not report.missed

compiled = torch.compile(q, backend="inductor_x86q", dynamic=True)
for shape in ((2, 12), (5, 7), (3, 40)):
    tokens = torch.randint(100, shape)
    with torch.no_grad():
        distance = snr(compiled(tokens), model(tokens))
    print(f"{shape[0]} sentences of {shape[1]} tokens: {distance:.1f} dB from float32")
    assert distance > 30
