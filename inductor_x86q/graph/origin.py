"""Where in the model a node comes from."""

from __future__ import annotations

from torch import fx

# How Dynamo writes the root of the model in a module's path, by how the model reached it.
_ROOTS = ("L__self__.", "L['self'].", "L['model'].", "L['fn'].")


def layer(node: fx.Node) -> str:
    """The path of the module that the node comes from; the node's own name where that is not known."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = str(next(reversed(stack.values()))[0])
        for root in _ROOTS:
            path = path.removeprefix(root)
        path = path.replace("L['self'].", "").replace("_modules['", "").replace("']", "")
        if path and not path.startswith("L["):
            return path
    return node.name


def source(node: fx.Node) -> str:
    """The last line of the node's stack trace that names a file, as file:line; empty where there is none."""
    for line in reversed(str(node.meta.get("stack_trace") or "").splitlines()):
        line = line.strip()
        if line.startswith("File ") and "<eval_with_key>" not in line:
            parts = line.split('"')
            number = line.split("line ")[-1].split(",")[0]
            return f"{parts[1]}:{number}"
    return ""
