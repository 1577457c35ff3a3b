"""The figures of `x86q bench` as a bar chart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path


def plot(speeds: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """A group of bars for each network, a bar for each engine: its speed, which `title` says what it is (needs matplotlib)."""
    from matplotlib.figure import Figure

    engines = list(dict.fromkeys(engine for of_network in speeds.values() for engine in of_network))
    figure = Figure(figsize=(max(6.0, 1.2 * len(speeds) + 2), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(engines), 1)
    for position, engine in enumerate(engines):
        places = [number + (position - (len(engines) - 1) / 2) * width for number in range(len(speeds))]
        axes.bar(places, [of_network.get(engine, math.nan) for of_network in speeds.values()], width, label=engine)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(speeds)), list(speeds), rotation=30, ha="right")
    axes.set_ylabel(title)
    axes.legend(fontsize="small", ncols=3)
    figure.savefig(path, dpi=150)
