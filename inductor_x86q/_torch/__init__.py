"""Every private torch API that the compiler touches, each reached in this package and nowhere else.

Here is what is called; `scopes` is what is replaced while Inductor compiles, `decompositions` what it decomposes.

Each function says what it relies on. All of them are exercised by the test suite on the oldest and the
newest supported torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
prims = torch.ops.prims

# Two compiles in two threads must not patch Inductor's module-level lists under each other's feet. Dynamo holds
# its own lock during torch.compile; ahead-of-time compiles do not take that one.
scope_lock = threading.RLock()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context `owner` has another `name`."""
    original = vars(owner)[name]  # as it is stored: a static method must be put back as one
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@functools.cache
def register_quantized_decomposed() -> None:
    """Registers torch.ops.quantized_decomposed; relies on that library being a side effect of this import."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


@functools.cache
def register_primitives() -> None:
    """Registers Inductor's own operators in torch.ops.prims; relies on that being a side effect of this import."""
    import torch._inductor.inductor_prims  # noqa: F401


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


def known(condition: Any) -> bool:
    """Whether a comparison of sizes holds for all sizes that the graph is compiled for; false where it depends.

    Asking by `if` instead would answer for the example at hand and fix the sizes to that answer. Relies on
    `statically_known_true`, which never adds a guard.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def guarded(condition: Any) -> bool:
    """Whether a comparison of sizes holds for the example at hand, which then becomes a guard of the compiled code.

    False where the size has no example. Relies on `guard_or_false`.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def same_shape(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    left, right = list(first), list(second)
    return len(left) == len(right) and all(known(a == b) for a, b in zip(left, right, strict=True))


def disable_modes() -> contextlib.AbstractContextManager[Any]:
    """Runs real tensors inside a pass, where fake and functional modes are active (as Inductor's constant folding)."""
    return torch.utils._python_dispatch._disable_current_modes()


def is_lifted_parameter(value: Any) -> bool:
    """Whether Dynamo lifted this example input from a module: it marks such tensors with this attribute."""
    return isinstance(value, torch.Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None


def bind_parameters(graph_module: fx.GraphModule, example_inputs: list[Any]) -> list[int]:
    """Turns the parameters that Dynamo lifted to inputs into attributes of `graph_module`, so that freezing sees them.

    Returns the positions of the inputs that remain. Relies on `is_lifted_parameter`, on the example inputs of
    parameters being real tensors, on AOTAutograd telling parameters by `_param_name_to_source`, and on the name of a
    source's `guard_source` saying whether it goes through a module: a tensor that some module holds keeps its mark
    where it is passed as an argument, and there it is no constant.
    """
    kept: list[int] = []
    sources: dict[str, Any] = {}
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        source = getattr(node, "_dynamo_source", None)
        is_argument = source is not None and "NN_MODULE" not in source.guard_source.name
        if is_argument or not is_lifted_parameter(value):
            kept.append(position)
            continue
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
    others = getattr(graph_module, "_param_name_to_source", None) or {}
    graph_module._param_name_to_source = {**others, **sources}  # type: ignore[assignment]
    graph_module.recompile()
    _guard_identity(set(sources.values()) - {None})
    return kept


def _guard_identity(sources: Set[Any]) -> None:
    """Has Dynamo compile again where another tensor stands in the place of one of these, whatever its contents are.

    Dynamo guards types, shapes and strides of what it lifts, and would run one model's code for another model of the
    same class; it also costs more at each call. With the global freezing flag Dynamo does the same as this. Relies on
    the tracing context's guards being made into a check after the backend is done, and on `TENSOR_MATCH` saying nothing
    of a tensor that its identity does not say.
    """
    from torch._dynamo.guards import GuardBuilder

    context = torch._guards.TracingContext.try_get()
    if context is None:  # called by other code than Dynamo
        return
    guards = context.guards_context.dynamo_guards
    others = [g for g in guards if g.originating_source not in sources or g.create_fn_name() != "TENSOR_MATCH"]
    guards.clear()
    for guard in (*others, *(source.make_guard(GuardBuilder.ID_MATCH) for source in sources)):
        guards.add(guard, collect_debug_stack=False)


def config_keys() -> set[str]:
    """The names of Inductor's options."""
    return set(torch._inductor.list_options())


def mode_options(mode: str) -> dict[str, Any]:
    """What a `torch.compile` mode stands for; raises RuntimeError that lists the modes when there is no such one."""
    return dict(torch._inductor.list_mode_options(mode))


def is_autotuning() -> bool:
    """Whether the compile at hand asks for max-autotune (relies on Inductor's configuration being patched by then)."""
    from torch._inductor import config

    return bool(config.max_autotune)


def keeps_constants() -> bool:
    """Whether the compile at hand leaves short constants the tensors they are, instead of writing their numbers out."""
    from torch._inductor import config

    return bool(config.always_keep_tensor_constants)


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


def mark_frozen(tensor: torch.Tensor) -> None:
    """Marks a constant as one that freezing made.

    The graph cache then takes it from the graph at hand, as it does the weights, instead of storing and hashing it
    element by element. Relies on `freezing_utils` keeping the mark as an attribute, and on passes running within
    freezing, where alone it sets it.
    """
    from torch._inductor.freezing_utils import maybe_set_is_frozen_param

    maybe_set_is_frozen_param(tensor)


def foreign_pre_grad_pass() -> bool:
    """Whether some quantization library has set Inductor's pre-grad hook (torchao's x86 quantizer does on import)."""
    from torch._inductor import config

    hook = config.pre_grad_custom_pass
    return hook is not None and type(hook).__module__.startswith("torchao.")


def compile_fx(
    graph_module: fx.GraphModule, example_inputs: list[Any], options: Mapping[str, Any], **keywords: Any
) -> Any:
    """Inductor's entry point; grad mode must be off, else it does not freeze."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    with torch.no_grad():
        return inductor_compile_fx(graph_module, example_inputs, config_patches=dict(options), **keywords)


def aot_package(exported: torch.export.ExportedProgram, path: str, options: Mapping[str, Any],
                extra_files: Callable[[], dict[str, str]]) -> None:  # fmt: skip
    """Compiles an exported program with AOTInductor into a .pt2; `extra_files` is asked for once it is compiled.

    Does what `torch._inductor.aoti_compile_and_package` does, which takes no extra files. Relies on
    `torch._inductor.aot_compile` returning the list of files under `aot_inductor.package`, on it taking no guards
    (`check_guards`), and on `package_pt2` storing extra files where all loaders leave them alone. Grad mode must be
    off, else Inductor does not freeze.
    """
    from torch.export.pt2_archive._package import package_pt2

    arguments, keywords = exported.example_inputs
    with torch.no_grad():
        files = torch._inductor.aot_compile(
            exported.module(check_guards=False), arguments, keywords, options={**options, "aot_inductor.package": True}
        )
    package_pt2(path, aoti_files=files, extra_files=extra_files())  # type: ignore[arg-type]


def read_extra_file(path: str, name: str) -> str | None:
    """An extra file of a .pt2, None where there is no such file. Loads no code; raises RuntimeError for no archive."""
    from torch.export.pt2_archive._package import PT2ArchiveReader
    from torch.export.pt2_archive.constants import EXTRA_DIR

    with PT2ArchiveReader(path) as archive:
        return archive.read_string(EXTRA_DIR + name) if EXTRA_DIR + name in archive.get_file_names() else None


def matcher_pass(name: str) -> Any:
    """A new `PatternMatcherPass`; the keyword is the same in all supported versions."""
    from torch._inductor.pattern_matcher import PatternMatcherPass

    return PatternMatcherPass(pass_name=name)


def register(
    matcher: Any, targets: tuple[Any, ...], check: Callable[[Any], bool], handler: Callable[..., None]
) -> None:
    """Registers `handler` for every call of one of `targets`, whatever its arguments, that `check` accepts."""
    from torch._inductor.pattern_matcher import CallFunctionVarArgs, register_graph_pattern

    register_graph_pattern(CallFunctionVarArgs(list(targets)), extra_check=check, pass_dict=matcher)(handler)


def sort_topologically(graph: fx.Graph) -> None:
    """Restores the order after rewrites that put a node before one it uses."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def run_uncompiled(graph_module: fx.GraphModule, example_inputs: list[Any], **keywords: Any) -> Callable[..., Any]:
    """An `inner_compile` for compile_fx that generates nothing: the frozen and fused graph itself is run, eagerly.

    Relies on every operator in it, Inductor's prims included, having an eager kernel.
    """

    def run(arguments: list[Any]) -> Any:
        values = list(arguments)
        arguments.clear()
        with torch.no_grad():
            return _EagerInterpreter(graph_module).run(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _EagerInterpreter(fx.Interpreter):
    """Runs a graph eagerly, except for what eager mode refuses and Inductor does not.

    Integer max pools run in float: eager mode's integer pool counts its indices in 8 bits. Views may copy: a kernel's
    real result has other strides than the fake one for which the view was made, and Inductor lays it out as needed.
    What a call adds is laid out as Inductor does it, since a linear takes any other strides for rows one after another.
    A sum always takes the accumulator's memory, which Inductor may make it do, whatever the kernel does by itself.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is aten.view.default:
            target = aten.reshape.default
        if target is prims._low_memory_max_pool_with_offsets.default and not args[0].is_floating_point():
            values, offsets = target(args[0].float(), *args[1:], **kwargs)
            return values.to(args[0].dtype), offsets
        if str(target).startswith("onednn.") and ".binary" in str(target):
            return _binary(target, args)
        return super().call_function(target, args, kwargs)


def _binary(target: Any, args: tuple[Any, ...]) -> torch.Tensor:
    """A call that adds its seventh argument; relies on that being so in every `binary` overload.

    Convolutions take accumulators whose channels lie innermost, linears those whose rows are contiguous. One that lies
    otherwise is converted first, as compiled code does. Compiled code may have laid it out so to begin with, and then
    sums into its memory: so does this, except where that memory is the input's, which only a converted one may share.
    """
    accumulator: torch.Tensor = args[6]
    layout = torch.channels_last if "conv" in str(target) else torch.contiguous_format
    in_place = "sum" in args
    shared = args[0].untyped_storage().data_ptr() == accumulator.untyped_storage().data_ptr() != 0
    if in_place and shared and accumulator.is_contiguous(memory_format=layout):
        raise RuntimeError(f"{target} is asked to add its result to its own input")
    packed = accumulator.clone(memory_format=layout)
    result = target(*args[:6], packed, *args[7:])
    if not in_place or shared or result.dtype != accumulator.dtype:
        return result
    return accumulator.copy_(result)


@dataclasses.dataclass(frozen=True)
class Generated:
    """The source of one wrapper, and for each of its buffers the nodes of the graph that the buffer stands for."""

    code: str
    origins: dict[str, list[fx.Node]]


@contextlib.contextmanager
def generated_code() -> Iterator[list[Generated]]:
    """Collects every wrapper that Inductor generates within this context.

    Relies on `GraphLowering.save_output_code` being called with the source while the graph's handler is active;
    torch's own tests collect it the same way. Caches are bypassed, since a cache hit generates nothing.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    found: list[Generated] = []

    def save(code: str) -> None:
        found.append(Generated(code, _buffer_origins()))

    with scope_lock, _caches_off(config), replaced(GraphLowering, "save_output_code", staticmethod(save)):
        yield found


@contextlib.contextmanager
def _caches_off(config: Any) -> Iterator[None]:
    with warnings.catch_warnings(), config.patch(force_disable_caches=True):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


def _buffer_origins() -> dict[str, list[fx.Node]]:
    """Relies on `V.graph.scheduler.nodes` being the fused nodes, each with its snodes, their IR and its `origins`."""
    from torch._inductor.virtualized import V

    scheduled = {fused: fused.get_nodes() for fused in V.graph.scheduler.nodes}
    called = {origin for nodes in scheduled.values() for node in nodes if _is_call(node) for origin in _origins(node)}
    found: dict[str, list[fx.Node]] = {}
    for fused, nodes in scheduled.items():
        origins = dict.fromkeys(origin for node in nodes for origin in _origins(node, called))
        for name in fused.get_buffer_names():
            found[name] = list(origins)
    return found


def _is_call(scheduled: Any) -> bool:
    return bool(scheduled.is_extern() or scheduled.is_template())


def _origins(scheduled: Any, called: Collection[fx.Node] = ()) -> Iterable[fx.Node]:
    """What a scheduled node computes.

    The origins of an operator's call also name its operands, and those of an operand the operator that asked for it in
    memory; both are left out.
    """
    origins = list(getattr(scheduled.node, "origins", None) or ())
    if not _is_call(scheduled):
        return [node for node in origins if node not in called] or origins
    operands = {operand for node in origins for operand in node.all_input_nodes}
    return [node for node in origins if node not in operands]


class _Enough(BaseException):
    """Unwinds Inductor once the source is there; no Exception, so that nothing on the way takes it for a failure."""


def generate_only(graph_module: fx.GraphModule, example_inputs: list[Any], **keywords: Any) -> Callable[..., Any]:
    """An `inner_compile` that generates the source, within `generated_code`, and does not call the C++ compiler."""
    from torch._inductor.compile_fx import compile_fx_inner

    uncompiled = run_uncompiled(graph_module, example_inputs)
    with until_source():
        compile_fx_inner(graph_module, example_inputs, **keywords)
    return uncompiled


@contextlib.contextmanager
def until_source() -> Iterator[None]:
    """Leaves this context, inside of `generated_code`, once Inductor has the source of a graph.

    Relies on `save_output_code` being called before anything of the source is compiled.
    """
    from torch._inductor.graph import GraphLowering

    collect = GraphLowering.save_output_code
    assert collect is not None, "until_source is entered outside of generated_code"

    def save(code: str) -> None:
        collect(code)
        raise _Enough

    with contextlib.suppress(_Enough), replaced(GraphLowering, "save_output_code", staticmethod(save)):
        yield


@contextlib.contextmanager
def isolated_caches(directory: str) -> Iterator[None]:
    """Within this context nothing compiled before is found again, and nothing compiled here is found afterwards.

    Only precompiled headers and shared objects, addressed by their content, are kept in `directory`. Relies on
    Inductor reading TORCHINDUCTOR_CACHE_DIR at each compile and on `clear_caches` dropping what it remembers.
    """
    from torch._inductor import config
    from torch._inductor.utils import clear_caches

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
    _forget(clear_caches)
    try:
        with _caches_off(config):
            yield
    finally:
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
        _forget(clear_caches)


def _forget(clear_caches: Callable[[], None]) -> None:
    torch.compiler.reset()
    clear_caches()


def profiled(call: Callable[[], Any], *, runs: int) -> list[tuple[str, float]]:
    """Name and microseconds of what torch's profiler sees in `runs` calls, in the order in which it began.

    Two calls go before, unseen: the first ones of a process allocate. Relies on `time_range` of the profiler's events.
    """
    for _ in range(2):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(runs):
            call()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)  # type: ignore[arg-type, return-value]
    return [(event.name, event.time_range.elapsed_us()) for event in events]


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
