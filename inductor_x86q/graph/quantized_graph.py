"""Q/dq graphs as their users hold them: all tensors side by side, named in `state_dict` as in the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq

SEPARATOR = "__"  # in an attribute's name, of what a dot separated
_NAMES = "x86q_names"  # in a graph's `meta`: of each attribute at the root the name that it had in the model


class QuantizedGraph(fx.GraphModule):
    """What `quantize` and `convert` return: the eager reference of what is compiled from it.

    Before each call of what it compiled, Dynamo looks at every module on the way to a tensor; a dictionary of tensors
    that has not changed it passes over. So the tensors are attributes of the root. `state_dict` and `load_state_dict`
    know them by the names that they had in the model, with `_int8`, `_scale` and `_zero_point` added to a weight's.
    """

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, "", keep_vars)
        names = self.meta[_NAMES]
        destination.update({prefix + names.get(key, key): value for key, value in own.items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        names = self.meta[_NAMES]
        attributes = {prefix + name: prefix + attribute for attribute, name in names.items()}
        own = {attributes.get(key, key): value for key, value in state_dict.items()}
        absent: list[str] = []
        super()._load_from_state_dict(own, prefix, metadata, strict, absent, unexpected, errors)
        missing += [prefix + names.get(key.removeprefix(prefix), key.removeprefix(prefix)) for key in absent]


def side_by_side(converted: fx.GraphModule) -> QuantizedGraph:
    """The graph with its tensors moved to its root; takes `converted` apart."""
    attributes: dict[str, str] = {}
    for node in converted.graph.find_nodes(op="get_attr"):
        path, _, last = str(node.target).rpartition(".")
        owner = converted.get_submodule(path)
        value = getattr(owner, last)
        if not path or not isinstance(value, torch.Tensor):
            continue
        if node.target not in attributes:
            attributes[node.target] = attribute = qdq.free_attribute(converted, attribute_of(node.target))
            if isinstance(value, torch.nn.Parameter):
                converted.register_parameter(attribute, value)
            else:
                persistent = last not in owner._non_persistent_buffers_set
                converted.register_buffer(attribute, value, persistent=persistent)
        node.target = attributes[node.target]
    quantized = QuantizedGraph(converted, converted.graph)
    quantized.meta[_NAMES] = {attribute: name for name, attribute in attributes.items()}
    return quantized.eval()


def attribute_of(name: str) -> str:
    """What a tensor of the model is called at the root, unless that is taken; what is exported and loaded keeps it."""
    return name.replace(".", SEPARATOR)
