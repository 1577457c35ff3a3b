"""Programs saved by torch.export.save: what loading and running one could make this process do, read without doing it."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

# The files of a program, and what torch does with them. Any other file may be code, as in a package.
_GRAPHS = re.compile(r"models/[^/]+\.json")
_CONFIGURATIONS = re.compile(r"data/(weights|constants)/[^/]+\.json")
_EXAMPLES = re.compile(r"data/sample_inputs/[^/]+\.pt")
_DATA = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+")
_FORMAT = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|\.format_version|\.storage_alignment|extra/.*"
)

# What a graph may call: operators of a tensor library, which compute, and arithmetic on sizes.
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|quantized|torchao|onednn|mkldnn|torchvision)\.(?!from_file\b|__(?!and|or|xor|[lr]shift))\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map|map_impl|invoke_subgraph|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_\w+"
    r"|(_operator|math)\.(add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem|trunc|ceil|floor|sqrt)"
)
# torch evaluates the text of a size's formula as Python: it may hold symbols, numbers and what formulas are made of.
_WORDS = re.compile(r"[us]\d+|Symbol|Integer|Add|Mul|Pow|Mod|PythonMod|FloorDiv|Max|Min|positive|integer|True|False")
_SIGNS = re.compile(r"""[\s\d()'"+*/,=<>-]*""")
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")


def obstacle(path: str) -> str:
    """Why loading a program may run what its author put there; empty where it can hold nothing but numbers and a graph.

    Raises RuntimeError for a file that is no archive. Relies on `load_pt2` reading the files that are listed above: it
    unpickles a payload that says `use_pickle`, custom objects and example inputs that `weights_only` refuses; it evaluates
    formulas and guards, imports what containers name, and looks up what the graph calls by its name.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader

    with PT2ArchiveReader(path) as archive:
        names = archive.get_file_names()
        if not any(_GRAPHS.fullmatch(name) for name in names):
            return "it is not in the format of today's torch.export.save"
        found = (_in_file(archive, name) for name in names)
        return next(filter(None, found), "")


def _in_file(archive: Any, name: str) -> str:
    if _GRAPHS.fullmatch(name):
        return next(_in_graph(json.loads(archive.read_string(name))), "")
    if _CONFIGURATIONS.fullmatch(name):
        return _in_configuration(json.loads(archive.read_string(name))["config"])
    if _EXAMPLES.fullmatch(name):
        contents = archive.read_bytes(name)
        try:
            if contents:
                torch.load(io.BytesIO(contents), weights_only=True)
        except Exception as error:
            return f"its example inputs have to be unpickled ({str(error).strip().splitlines()[0]})"
        return ""
    if _DATA.fullmatch(name) or _FORMAT.fullmatch(name):
        return ""
    return f"it holds {os.path.basename(name)!r}, which is no part of a program of tensors"


def _in_configuration(payloads: dict[str, Any]) -> str:
    for tensor, payload in payloads.items():
        if payload["use_pickle"] or not re.fullmatch(r"weight_\d+|tensor_\d+", payload["path_name"]):
            return f"{tensor!r} has to be unpickled"
    return ""


def _in_graph(value: Any) -> Iterator[str]:
    """What in a graph is more than calls of operators on tensors and numbers."""
    if isinstance(value, list):
        for item in value:
            yield from _in_graph(item)
    if not isinstance(value, dict):
        return
    for name, item in value.items():
        if name in ("target", "as_operator") and isinstance(item, str) and not _OPERATORS.fullmatch(item):
            yield f"its graph calls {item!r}"
        elif name == "expr_str" and not _is_formula(item):
            yield f"a size in its graph is {item!r}, which would be evaluated"
        elif name == "guards_code" and item:
            yield "it holds conditions on its inputs, which would be evaluated"
        elif name == "range_constraints" and not all(re.fullmatch(r"[us]\d+", symbol) for symbol in item):
            yield "it holds ranges of more than sizes, which would be evaluated"
        elif name in ("in_spec", "out_spec") and isinstance(item, str) and not _plain_containers(json.loads(item)):
            yield "its inputs or outputs are in containers other than tuple, list and dict"
        else:
            yield from _in_graph(item)


def _is_formula(text: Any) -> bool:
    return isinstance(text, str) and _SIGNS.fullmatch(_WORDS.sub("", text)) is not None


def _plain_containers(spec: Any) -> bool:
    if isinstance(spec, list):
        return all(_plain_containers(item) for item in spec)
    if isinstance(spec, dict):
        return spec.get("type") in _CONTAINERS and _plain_containers(spec.get("children_spec", []))
    return True
