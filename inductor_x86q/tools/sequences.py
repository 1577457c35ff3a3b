"""Encoders of text and recurrent networks for the benchmark: random weights in the shapes of well-known models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from inductor_x86q.errors import QuantizationError


class _Encoder(torch.nn.Module):
    """The last hidden state of one of Hugging Face's encoders, of token numbers (batch, length)."""

    def __init__(self, **configuration: Any) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertModel
        except Exception as error:
            raise QuantizationError(
                f"transformers cannot be imported ({error}): pip install 'inductor-x86q[models]'"
            ) from error
        self.model = BertModel(BertConfig(**configuration), add_pooling_layer=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens).last_hidden_state

    @staticmethod
    def example(batch: int, length: int) -> torch.Tensor:
        return torch.randint(1000, 30000, (batch, length))


class _Recurrent(torch.nn.Module):
    """Two layers of 512, and what they give at each step: (batch, length, 512)."""

    def __init__(self, kind: type[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = kind(512, 512, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)[0]

    @staticmethod
    def example(batch: int, length: int) -> torch.Tensor:
        return torch.randn(batch, length, 512)


NETWORKS: dict[str, Callable[[], Any]] = {
    "hf:bert": _Encoder,  # its base size
    "hf:minilm": functools.partial(
        _Encoder, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
    "lstm": functools.partial(_Recurrent, torch.nn.LSTM),
    "gru": functools.partial(_Recurrent, torch.nn.GRU),
}


def build(name: str, batch: int, length: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network in eval mode and what it is called with: so many sequences of so many tokens or steps.

    Raises QuantizationError where transformers is missing.
    """
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    return model, model.example(batch, length)
