"""What the code has to look like: imports point down, Inductor is reached in one folder, files stay short."""

from __future__ import annotations

import graphlib
from pathlib import Path

from tests import structure

# Files that are still to be cut. Take out what is.
TOO_LONG: set[str] = set()


def test_imports_point_down() -> None:
    order = list(structure.LAYERS)
    upwards = [
        f"{module} (line {line}) imports {target}, which is above it"
        for module, targets in structure.our_imports().items()
        for target, line in targets.items()
        if order.index(structure.layer(target)) > order.index(structure.layer(module))
    ]
    assert upwards == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """The package itself is left out: it names what the others are used by, and they are used through it."""
    graph = {module: set(targets) - {""} for module, targets in structure.our_imports().items() if module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_inductor_and_dynamo_are_reached_in_one_folder() -> None:
    found = [
        f"{module} (line {line}): {name}"
        for module, path in structure.sources().items()
        if not f"{module}.".startswith("inductor.")
        for name, line in structure.private_uses(path)
    ]
    assert found == []


def test_kernels_know_neither_graphs_nor_inductor() -> None:
    for module, path in structure.sources().items():
        if f"{module}.".startswith("kernels."):
            outside = {name for name, _ in structure.imports(module, path) if name.startswith(("torch.fx", "torch._"))}
            assert outside == set(), module


def test_no_file_is_too_long() -> None:
    sources = [*structure.sources().values(), *Path(__file__).parent.rglob("*.py")]
    long = {path.name for path in sources if len(path.read_text().splitlines()) > 400}
    assert long == TOO_LONG


def test_the_picture_is_up_to_date() -> None:
    assert structure.drawn() == structure.PAGE.read_text(), "run `python -m tests.structure --write`"
