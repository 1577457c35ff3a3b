"""Encoders of transformers, of random weights: called by name, all of their linears in int8, results of their own types."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import inspection, testing

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
WORDS = {**SIZES, "vocab_size": 100}
PATCHES = {**SIZES, "image_size": 32, "patch_size": 8}
SOUND = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip


def text() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    return {"input_ids": torch.randint(3, 100, (2, 16)), "attention_mask": mask}


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 800)}


# Model, configuration, inputs; how many convolutions it has, which are int8 with calibration only.
ENCODERS: dict[str, tuple[str, dict[str, Any], Any, int]] = {
    "Bert": ("BertModel", WORDS, text, 0),
    "Roberta": ("RobertaModel", WORDS, text, 0),
    "DistilBert": ("DistilBertModel", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 100}, text, 0),
    "MPNet": ("MPNetModel", WORDS, text, 0),
    "ModernBert": ("ModernBertModel", {**WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                   "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}, text, 0),
    "Deberta": ("DebertaModel", {**WORDS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, text, 0),
    "ViT": ("ViTModel", PATCHES, image, 1),
    "CLIPVision": ("CLIPVisionModel", PATCHES, image, 1),
    "Wav2Vec2": ("Wav2Vec2Model", {**SIZES, **SOUND}, sound, 3),
}  # fmt: skip

# Of constants, positions above all, nothing is computed at run time.
CONSTANT = ("pos_proj", "pos_q_proj")


def built(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], set[str], int]:
    """The model, its inputs, the names of its linears that compute at run time, and how many convolutions it has."""
    torch.manual_seed(0)
    kind, configuration, inputs, convolutions = ENCODERS[name]
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**configuration)).eval()
    linears = {path for path, module in model.named_modules()
               if isinstance(module, nn.Linear) and path.rpartition(".")[2] not in CONSTANT}  # fmt: skip
    return model, inputs(), linears, convolutions


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "per token"])
@pytest.mark.parametrize("name", ENCODERS)
def test_all_linears_are_int8(name: str, dynamic: bool) -> None:
    check(name, dynamic)


def test_all_linears_of_a_bert_are_int8() -> None:
    check("Bert", False)


def check(name: str, dynamic: bool) -> None:
    model, inputs, linears, convolutions = built(name)
    how: dict[str, Any] = {"dynamic": "per_token"} if dynamic else {"calibration": [inputs]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = inductor_x86q.quantize(model, (), kwargs=inputs, reduce_range=True, **how)
    with torch.no_grad():
        expected, reference = model(**inputs), quantized(**inputs)
    outputs, report = inspection.run_fused(quantized, (), inputs)
    assert type(outputs) is type(reference) is type(expected)
    assert {fusion.layer for fusion in report.fused if fusion.operator == "linear"} == linears
    assert report.missed == []
    assert sum(fusion.operator == "conv" for fusion in report.fused) == (0 if dynamic else convolutions)
    assert testing.snr(outputs[0], reference[0]) > 35
    assert testing.snr(reference[0], expected[0]) > 25
