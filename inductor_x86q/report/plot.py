"""A search for a budget as a picture: the accuracy of what was tried against its time. Drawn by matplotlib, where that is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from inductor_x86q.report.model import Tuning


def obstacle() -> str:
    """What stands in the way of drawing; nothing where matplotlib is installed."""
    return (
        "" if importlib.util.find_spec("matplotlib") else "matplotlib is not installed: pip install inductor-x86q[plot]"
    )


def draw(tuning: Tuning, path: Path, title: str) -> None:
    """Writes the picture in the format that the file's name ends in.

    Raises:
        ValueError: matplotlib knows no such format.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    timed = all(step.milliseconds is not None for step in tuning.steps)
    places = [(step.milliseconds or 0.0) if timed else 100 * step.share_of_macs for step in tuning.steps]
    least = tuning.float_metric - tuning.max_drop
    within = [step.metric >= least for step in tuning.steps]
    for kept, colour, label in ((True, "#16803c", "within the budget"), (False, "#d11a2a", "outside of it")):
        chosen = [number for number, inside in enumerate(within) if inside is kept]
        if chosen:
            metrics = [tuning.steps[number].metric for number in chosen]
            axes.scatter([places[number] for number in chosen], metrics, color=colour, label=label, zorder=3)
    for place, step in zip(places, tuning.steps, strict=True):
        axes.annotate(step.what, (place, step.metric), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.axhline(tuning.float_metric, color="#5c6470", linewidth=1, label="float32")
    axes.axhline(least, color="#c2710c", linewidth=1, linestyle="--", label="the least that is allowed")
    axes.set_xlabel("milliseconds a call, as its layers take" if timed else "multiply-accumulates out of int8, %")
    axes.set_ylabel("metric")
    axes.set_title(title)
    axes.margins(x=0.15, y=0.1)
    axes.legend(fontsize=8)
    figure.savefig(path)
