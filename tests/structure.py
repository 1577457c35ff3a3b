"""The modules of the package, what each imports, and the picture of it: `python -m tests.structure`.

Imports are read from the source, so those inside of functions and under TYPE_CHECKING count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "inductor_x86q"

# The layers, the lowest first: a module imports its own layer and those above it in this list. A layer is what begins with one
# of its names, the longest name that fits.
LAYERS: dict[str, tuple[str, ...]] = {
    "errors, cpu, version": ("errors", "cpu", "version"),
    "inductor": ("inductor",),
    "graph": ("graph",),
    "kernels": ("kernels",),
    "inductor/lowering": ("inductor.lowering",),
    "passes": ("passes",),
    "report": ("report",),
    "quantization": ("quantization",),
    "backend, aot": ("backend", "aot"),
    "accuracy": ("accuracy",),
    "inspection, testing": ("inspection", "testing", "pytest_plugin"),
    "tools": ("tools",),
    "cli": ("cli", "__main__"),
}


def sources() -> dict[str, Path]:
    """The file of each module, by its name within the package: "graph.calls", and "" for the package itself."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer(module: str) -> str:
    """The layer that a module belongs to."""
    fits = {name: layer for layer, names in LAYERS.items() for name in names if f"{module}.".startswith(f"{name}.")}
    if not fits:
        raise ValueError(f"{module} is in no layer: add it to LAYERS in {Path(__file__).name}")
    return fits[max(fits, key=len)]


def imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """What a module imports, by its absolute name, and in which line: `from a import b` is `a.b`."""
    parts = [PACKAGE, *filter(None, module.split("."))]
    home = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*home[: len(home) - node.level + 1], node.module or ""]) if node.level else node.module
            yield from ((f"{base}.{alias.name}".replace("..", "."), node.lineno) for alias in node.names)


def our_imports() -> dict[str, dict[str, int]]:
    """For each module the modules of ours that it imports, and in which line."""
    modules = sources()
    found: dict[str, dict[str, int]] = {}
    for module, path in modules.items():
        for name, line in imports(module, path):
            if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
                continue
            inner = name[len(PACKAGE) + 1 :]
            target = inner if inner in modules else inner.rpartition(".")[0]  # a module, or a name in one
            if target != module:
                found.setdefault(module, {}).setdefault(target, line)
    return found
