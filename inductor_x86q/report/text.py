"""The report as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inductor_x86q.report import tables
from inductor_x86q.report.model import Content, Fusion, Miss
from inductor_x86q.report.tables import Column

if TYPE_CHECKING:
    from rich.console import Group

_SHORT = {"uint8": "u8", "int8": "s8", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def short_kernel(fusion: Fusion) -> str:
    """The kernel and what it does behind the product: "qconv +add +relu"."""
    name = f"q{fusion.operator}"
    return " +".join([name, *(operator for operator in fusion.absorbed if operator != "quantize")])


def short_types(fusion: Fusion) -> str:
    """Input × weight → output: "u8×s8→u8"."""
    x, w, y = (_SHORT.get(dtype, dtype) for dtype in (fusion.input_dtype, fusion.weight_dtype, fusion.output_dtype))
    return f"{x}×{w}→{y}"


def short_shape(shape: Sequence[Any]) -> str:
    return "×".join(map(str, shape))


def short_count(number: int | None) -> str:
    if number is None:
        return "?"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def missed(report: Content) -> str:
    """What was missed, a line each."""
    return "\n".join(f"  {miss}" for miss in report.missed)


def summary(report: Content) -> str:
    """The totals in one line."""
    time = "" if report.microseconds is None else f", {report.microseconds / 1000:.2f} ms in kernels"
    return (
        f"{len(report.fused)} of {report.layers} layers in int8 ({report.int8_share_of_macs:.1%} of the "
        f"multiply-accumulates), {len(report.missed)} missed, {len(report.kept_float)} float by design; "
        f"{len(report.quantizes_left)} quantize and "
        f"{len(report.dequantizes_left)} dequantize nodes left, {report.float_subgraphs} "
        f"float subgraph{'s' * (report.float_subgraphs != 1)} between int8 layers{time}"
    )


def table(report: Content, width: int) -> str:
    """All of it, no line of the table longer than `width` characters (at least 60)."""
    return tables.plain(renderable(report), max(width, tables.LEAST_WIDTH))


def renderable(report: Content) -> Group:
    """All of it, to be printed by rich."""
    parts: list[Any] = [_table(report.fused)] if report.fused else []
    for title, misses, style in (
        ("missed, should be int8", report.missed, "bold red"),
        ("float by design", report.kept_float, "bold"),
    ):
        if misses:
            parts.append(tables.group(tables.styled(f"{title}:", style), *_grouped(misses)))
    if report.tuning is not None:
        parts.append(tables.group(tables.styled("within a budget of accuracy:", "bold"), report.tuning))
    if report.drift is not None:
        parts.append(report.drift)
    parts += dict.fromkeys(report.notes)
    return tables.group(*(piece for part in parts for piece in (part, "")), tables.styled(summary(report), "bold"))


def _table(fused: Sequence[Fusion]) -> tables.Table:
    timed = any(f.microseconds is not None for f in fused)
    found = tables.Table(
        Column("layer", cut="beginning", style="cyan"), Column("kernel", cut="end"), "types", "output",
        Column("MACs", right=True), *([Column("µs", right=True)] if timed else []),
    )  # fmt: skip
    for f in fused:
        row = [f.layer, short_kernel(f), short_types(f), short_shape(f.output_shape), short_count(f.macs)]
        found.add(*row, *([f"{f.microseconds:.1f}" if f.microseconds is not None else ""] if timed else []))
    return found


def _grouped(misses: Sequence[Miss]) -> list[str]:
    """A line a reason, and below it the layers that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for miss in misses:
        by_reason.setdefault(str(miss.obstacle), []).append(f"{miss.layer} ({miss.operator})")
    return [line for reason, layers in by_reason.items() for line in (f"  {reason}", f"    {', '.join(layers)}")]
