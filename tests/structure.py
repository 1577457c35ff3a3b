"""The modules of the package, what each imports, and the picture of it.

    python -m tests.structure           # prints the picture
    python -m tests.structure --write   # puts it into CONTRIBUTING.md

Imports are read from the source, so those inside of functions and under TYPE_CHECKING count like all others.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "inductor_x86q"

# The layers, the lowest first: a module imports its own layer and those in front of it here. Modules belong to the layer that
# has their name, or that of a folder they are in, the innermost one; "" is the package itself, its public names.
LAYERS: dict[str, tuple[str, ...]] = {
    "errors, cpu, progress, version": ("errors", "cpu", "progress", "version"),
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
    "budgets": ("accuracy.budget", "accuracy.costs", "accuracy.metric"),
    "inductor_x86q": ("",),
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
    owners = {name: layer for layer, names in LAYERS.items() for name in names}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in owners:
            return owners[name]
    raise ValueError(f"{module} is in no layer: add it to LAYERS in tests/{Path(__file__).name}")


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


def private_uses(path: Path) -> Iterator[tuple[str, int]]:
    """Where a file imports `torch._inductor` or `torch._dynamo`, or reaches them as attributes."""
    private = ("torch._inductor", "torch._dynamo")
    for name, line in imports("", path):
        if f"{name}.".startswith(tuple(f"{x}." for x in private)):
            yield name, line
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in private:
            yield ast.unparse(node), node.lineno


def picture() -> str:
    """The layers, the highest first: what each imports of those below it, and its modules."""
    found, order = our_imports(), list(LAYERS)
    lines = []
    for number, name in reversed(list(enumerate(order))):
        modules = sorted(module for module in sources() if layer(module) == name)
        below = {layer(target) for module in modules for target in found.get(module, {})} - {name}
        arrows = [other for other in order[:number] if other in below]
        upwards = [other for other in order[number:] if other in below]
        lines.append(name)
        lines += [f"  ↓ {', '.join(arrows)}"] if arrows else []
        lines += [f"  ↑ {', '.join(upwards)}   which must not be"] if upwards else []
        lines += textwrap.wrap(", ".join(_inside(module, name) for module in modules), 116,
                               initial_indent="    ", subsequent_indent="    ")  # fmt: skip
    return "\n".join(lines) + "\n"


def _inside(module: str, layer: str) -> str:
    """A module's name without its folder's, where the layer is called by that."""
    folder = layer.replace("/", ".")
    return module.removeprefix(f"{folder}.") if module not in ("", folder) else "__init__"


PAGE = ROOT / "CONTRIBUTING.md"
_BLOCK = re.compile(r"(<!-- python -m tests.structure -->\n```\n).*?(```\n<!-- -->)", re.DOTALL)


def drawn() -> str:
    """CONTRIBUTING.md with the picture as it is now."""
    return _BLOCK.sub(lambda match: match[1] + picture() + match[2], PAGE.read_text())


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(drawn())
    else:
        print(picture(), end="")
