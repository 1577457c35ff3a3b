"""The report as JSON.

`Report.to_json()` writes one JSON object (SCHEMA, VERSION):

    schema    "inductor_x86q.report"
    version   1; a reader refuses a greater one. Fields may be added within a version, none changes its meaning.
    totals    layers, int8_layers, macs, int8_macs, missed, kept_float, quantizes_left, dequantizes_left, float_subgraphs,
              microseconds (null where nothing was measured)
    fused     int8 kernels: the fields of Fusion
    missed, kept_float
              layers that are not int8: the fields of Miss, `obstacle` as {"reason": name, "detail": text, "text": all}
    generated what runs in kernels that Inductor generates: the fields of Operation
    quantizes_left, dequantizes_left
              names of the nodes that no kernel absorbed
    passes    {"stage", "rule", "matches", "seconds"}: what each rule of each stage did; seconds are the stage's
    nodes     the graph after fusing, in order: the fields of Node
    kernels   calls in the order in which they run: the fields of Kernel; empty where nothing was measured
    code      calls of the generated C++ in their order: the fields of Code; empty where it was not asked for
    notes     what else is to be said, a line each
    drift     the fields of Drift, its `layers` those of LayerDrift; null where it was not measured
    tuning    the fields of Tuning, what a search for a budget of accuracy found: its `moved` those of Moved, its `steps`
              those of Step, `before` and `after` as `drift`; null where there was none

Shapes are lists of numbers, and of strings where a size is not known when compiling; types are torch's names.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from inductor_x86q.graph.reasons import Obstacle, Reason
from inductor_x86q.report.model import KINDS, Content, Drift, LayerDrift, Moved, Step, Tuning

SCHEMA, VERSION = "inductor_x86q.report", 1


def write(report: Content) -> str:
    content = {"schema": SCHEMA, "version": VERSION, "totals": report.totals()}
    for name in KINDS:
        content[name] = [_plain(item) for item in getattr(report, name)]
    content["drift"], content["tuning"] = _plain(report.drift), _plain(report.tuning)
    return json.dumps(content, indent=1, allow_nan=False)


def read(text: str) -> dict[str, Any]:
    """The fields of the report that `write` wrote; raises ValueError for no report or a later version of the schema."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"not a report: expected a JSON object with schema {SCHEMA!r}")
    if content["version"] > VERSION:
        raise ValueError(
            f"the report has version {content['version']} of the schema, this package reads up to {VERSION}"
        )
    lists = {name: [_read(kind, item) for item in content.get(name, ())] for name, kind in KINDS.items()}
    return {**lists, "drift": _read_drift(content.get("drift")), "tuning": _read_tuning(content.get("tuning"))}


def _plain(item: Any) -> Any:
    """What JSON can hold; numbers that it cannot are given as text."""
    if isinstance(item, Obstacle):
        return {"reason": item.reason.name, "detail": item.detail, "text": str(item)}
    if dataclasses.is_dataclass(item):
        return {field.name: _plain(getattr(item, field.name)) for field in dataclasses.fields(item)}
    if isinstance(item, (list, tuple)):
        return [_plain(x) for x in item]
    return item if not isinstance(item, float) or math.isfinite(item) else str(item)


def _read(kind: Any, item: Any) -> Any:
    if kind is str:
        return item
    values = {field.name: item[field.name] for field in dataclasses.fields(kind) if field.name in item}
    for name, value in values.items():
        if name == "obstacle":
            values[name] = Obstacle(Reason[value["reason"]], value["detail"])
        elif isinstance(value, list):
            values[name] = tuple(value)
    return kind(**values)


def _read_drift(content: Any) -> Drift | None:
    if content is None:
        return None
    found = _read(Drift, content)
    return dataclasses.replace(found, layers=tuple(_read(LayerDrift, x) for x in content["layers"]))


def _read_tuning(content: Any) -> Tuning | None:
    if content is None:
        return None
    return dataclasses.replace(
        _read(Tuning, content),
        moved=tuple(_read(Moved, x) for x in content["moved"]),
        steps=tuple(_read(Step, x) for x in content["steps"]),
        before=_read_drift(content["before"]),
        after=_read_drift(content["after"]),
    )
