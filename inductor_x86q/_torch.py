"""Every private torch API that this package touches, each reached here and nowhere else.

Each function says what it relies on. All of them are exercised by the test suite on the oldest and the
newest supported torch.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
prims = torch.ops.prims

# Two compiles in two threads must not patch Inductor's module-level lists under each other's feet. Dynamo holds
# its own lock during torch.compile; ahead-of-time compiles do not take that one.
_scope_lock = threading.RLock()

# Activations that Inductor decomposes before freezing, where the passes want to see one node. What no pass
# consumed is decomposed afterwards (`decompose_node`), by the very same table.
KEPT_WHOLE: tuple[Any, ...] = (
    aten.clamp.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.leaky_relu.default,
)


@functools.cache
def register_quantized_decomposed() -> None:
    """Registers torch.ops.quantized_decomposed; relies on that library being a side effect of this import."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decomposition table without KEPT_WHOLE.

    Relies on `torch._inductor.decomposition.select_decomp_table()` returning the table that compile_fx would use.
    Module level (no closure) because Inductor pickles a reference to it into its cache key.
    """
    from torch._inductor.decomposition import select_decomp_table

    table = dict(select_decomp_table())
    for target in KEPT_WHOLE:
        table.pop(target, None)
    return table


def decompose_node(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Replaces `node`, one of KEPT_WHOLE, by what Inductor decomposes it into.

    Relies on `make_fx` tracing a decomposition over fake tensors, and on `meta["val"]` of the arguments.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    table = select_decomp_table()
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]

    def call(*values: torch.Tensor) -> torch.Tensor:
        pending = iter(values)
        arguments = [next(pending) if isinstance(a, fx.Node) else a for a in node.args]
        return node.target(*arguments, **node.kwargs)

    fakes = [t.meta["val"] for t in tensors]
    with fakes[0].fake_mode:
        traced = make_fx(call, decomposition_table=table)(*fakes)
    environment: dict[fx.Node, fx.Node] = {}
    for inner, outer in zip(traced.graph.find_nodes(op="placeholder"), tensors, strict=True):
        environment[inner] = outer
    with node.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                node.replace_all_uses_with(environment[inner.args[0]])
                continue
            copy = node.graph.node_copy(inner, lambda n: environment[n])
            for key in ("nn_module_stack", "stack_trace"):
                if key in node.meta:
                    copy.meta[key] = node.meta[key]
            environment[inner] = copy
    node.graph.erase_node(node)


def propagate_fake_tensors(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Sets `meta["val"]` of one new node from its arguments' (relies on fake tensors carrying their mode)."""
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = fake_mode(node.graph)
    with mode:
        node.meta["val"] = node.target(*values[0], **values[1])  # type: ignore[operator]


def fake_mode(graph: fx.Graph) -> Any:
    """The FakeTensorMode of a graph that Inductor is compiling (relies on `V.fake_mode` being set by compile_fx)."""
    from torch._inductor.virtualized import V

    if isinstance(V.fake_mode, torch._subclasses.FakeTensorMode):
        return V.fake_mode
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)


def disable_modes() -> contextlib.AbstractContextManager[Any]:
    """Runs real tensors inside a pass, where fake and functional modes are active (as Inductor's constant folding)."""
    return torch.utils._python_dispatch._disable_current_modes()


def is_lifted_parameter(value: Any) -> bool:
    """Whether Dynamo lifted this example input from a module: it marks such tensors with this attribute."""
    return isinstance(value, torch.Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None


def bind_parameters(graph_module: fx.GraphModule, example_inputs: list[Any]) -> list[int]:
    """Turns the parameters that Dynamo lifted to inputs into attributes of `graph_module`, so that freezing sees them.

    Returns the positions of the inputs that remain. Relies on `is_lifted_parameter`, on the example inputs of
    parameters being real tensors, and on AOTAutograd telling parameters by `_param_name_to_source`.
    """
    sources = dict(getattr(graph_module, "_param_name_to_source", None) or {})
    kept: list[int] = []
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if not is_lifted_parameter(value):
            kept.append(position)
            continue
        source = getattr(node, "_dynamo_source", None)
        if isinstance(value, torch.nn.Parameter):
            graph_module.register_parameter(node.name, value)
        else:
            graph_module.register_buffer(node.name, value)
        sources[node.name] = source
        with graph_module.graph.inserting_before(node):
            attribute = graph_module.graph.get_attr(node.name)
        attribute.meta.update(node.meta)
        node.replace_all_uses_with(attribute)
        graph_module.graph.erase_node(node)
    graph_module._param_name_to_source = sources
    graph_module.recompile()
    return kept


def config_keys() -> set[str]:
    """The names of Inductor's options."""
    return set(torch._inductor.list_options())


def mode_options(mode: str) -> dict[str, Any]:
    """What a `torch.compile` mode stands for; raises RuntimeError that lists the modes when there is no such one."""
    return dict(torch._inductor.list_mode_options(mode))


def cxx_compiler() -> str:
    """The C++ compiler that Inductor will call; raises RuntimeError naming what was looked for when there is none.

    Relies on `cpp_builder.get_cpp_compiler` searching `config.cpp.cxx`.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception as error:
        searched = ", ".join(str(c) for c in config.cpp.cxx if c) or "g++"
        raise RuntimeError(
            f"no C++ compiler found (looked for {searched}): Inductor compiles its kernels with it. "
            "Install one (Debian and Ubuntu: apt-get install g++) or set the environment variable CXX to its path."
        ) from error


def _is_inductors_own(entry: Any) -> bool:
    """False for the patterns of Inductor's or a third party's quantization passes (told by the handler's module)."""
    handler = getattr(entry, "handler", None)
    module = getattr(handler, "__module__", "torch._inductor") or "torch._inductor"
    return module.startswith("torch._inductor") and not module.endswith(".quantization")


def _filtered(original: Any, before: Callable[[Any], Any] | None = None) -> Any:
    """A view of a PatternMatcherPass without the entries of other quantization passes; it runs `before` first.

    The view shares the original's registry, so what Inductor registers while it stands in is not lost.
    """
    from torch._inductor.pattern_matcher import PatternMatcherPass

    class Filtered(PatternMatcherPass):
        def apply(self, graph: Any) -> int:
            if before is not None:
                before(graph)
            own = PatternMatcherPass(pass_name=original.pass_name)
            for key, entries in original.patterns.items():
                kept = [entry for entry in entries if _is_inductors_own(entry)]
                if kept:
                    own.patterns[key] = kept
            return own.apply(graph)

    view = Filtered(pass_name=original.pass_name)
    view.patterns = original.patterns
    view.seen_patterns = original.seen_patterns
    return view


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = vars(owner)[name]  # as it is stored: a static method must be put back as one
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def pipeline_scope(pipeline: Callable[[fx.Graph], Any]) -> Iterator[None]:
    """Within this context Inductor's freezing runs `pipeline(graph)` first, and no other quantization passes.

    Relies on: `freezing_patterns.pass_patterns` and `post_grad.pass_patterns` being the lists that freezing and
    post-grad lowering walk, looked up at each call; `compile_fx` looking up `select_decomp_table` in its own module.
    """
    from torch._inductor import compile_fx as compile_fx_module
    from torch._inductor.fx_passes import freezing_patterns, post_grad

    with _scope_lock, contextlib.ExitStack() as stack:
        first, *rest = freezing_patterns.pass_patterns
        freezing = [_filtered(first, before=pipeline), *map(_filtered, rest)]
        stack.enter_context(_replaced(freezing_patterns, "pass_patterns", freezing))
        lowering = [_filtered(p) for p in post_grad.pass_patterns]
        stack.enter_context(_replaced(post_grad, "pass_patterns", lowering))
        stack.enter_context(_replaced(compile_fx_module, "select_decomp_table", decompositions))
        yield


def foreign_pre_grad_pass() -> bool:
    """Whether some quantization library has set Inductor's pre-grad hook (torchao's x86 quantizer does on import)."""
    from torch._inductor import config

    hook = config.pre_grad_custom_pass
    return hook is not None and type(hook).__module__.startswith("torchao.")


def compile_fx(graph_module: fx.GraphModule, example_inputs: list[Any], options: Mapping[str, Any], **keywords: Any) -> Any:
    """Inductor's entry point; grad mode must be off, else it does not freeze."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    with torch.no_grad():
        return inductor_compile_fx(graph_module, example_inputs, config_patches=dict(options), **keywords)


def matcher_pass(name: str) -> Any:
    """A new `PatternMatcherPass`; the keyword is the same in all supported versions."""
    from torch._inductor.pattern_matcher import PatternMatcherPass

    return PatternMatcherPass(pass_name=name)


def register(matcher: Any, targets: tuple[Any, ...], check: Callable[[Any], bool], handler: Callable[..., None]) -> None:
    """Registers `handler` for every call of one of `targets`, whatever its arguments, that `check` accepts."""
    from torch._inductor.pattern_matcher import CallFunctionVarArgs, register_graph_pattern

    register_graph_pattern(CallFunctionVarArgs(list(targets)), extra_check=check, pass_dict=matcher)(handler)


def sort_topologically(graph: fx.Graph) -> None:
    """Restores the order after rewrites that put a node before one it uses."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def run_uncompiled(graph_module: fx.GraphModule, example_inputs: list[Any], **keywords: Any) -> Callable[..., Any]:
    """An `inner_compile` for compile_fx that generates nothing; the result must not be called for its value.

    Returns outputs of the right shape and type, so that Dynamo can go on after a graph break.
    """
    output = next(iter(graph_module.graph.find_nodes(op="output")))

    def run(*arguments: Any) -> tuple[Any, ...]:
        def stand_in(node: Any) -> Any:
            value = node.meta.get("val") if isinstance(node, fx.Node) else node
            if not isinstance(value, torch.Tensor):
                return value
            return torch.zeros([int(size) for size in value.shape], dtype=value.dtype)

        return tuple(stand_in(node) for node in output.args[0])

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def generated_code() -> Iterator[list[str]]:
    """Collects the source of every wrapper that Inductor generates within this context.

    Relies on `GraphLowering.save_output_code` being called with it; torch's own tests collect it the same way.
    Caches are bypassed, since a cache hit generates nothing.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []
    with _scope_lock, config.patch(force_disable_caches=True), _replaced(GraphLowering, "save_output_code", codes.append):
        yield codes


def compile_fresh(model: torch.nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(model)` under code objects of its own, so that no entry is added to those of the model.

    A graph module is rebuilt, so that Dynamo still sees it at the root and keeps the origin of its nodes.
    """
    if isinstance(model, fx.GraphModule):
        fresh = fx.GraphModule(model, model.graph)
        fresh.meta.update(model.meta)
        return torch.compile(fresh, backend=backend)

    def call(*arguments: Any) -> Any:
        return model(*arguments)

    call.__code__ = call.__code__.replace(co_name=f"call_{id(backend)}")
    return torch.compile(call, backend=backend)
