"""What of Inductor is replaced while it compiles a graph of ours, and put back afterwards."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor.decompositions import decompositions
from inductor_x86q.inductor.patches.linked_objects import linked_objects
from inductor_x86q.inductor.scoping import replaced, scope_lock


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
def pipeline_scope(pipeline: Callable[[fx.Graph], Any]) -> Iterator[None]:
    """Within this context Inductor's freezing runs `pipeline(graph)` first, and no other quantization passes.

    Relies on: `freezing_patterns.pass_patterns` and `post_grad.pass_patterns` being the lists that freezing and
    post-grad lowering walk, looked up at each call; `freezing_patterns.lazy_init` registering all that freezing does;
    `compile_fx` looking up `select_decomp_table` in its own module.
    """
    from torch._inductor import compile_fx as compile_fx_module
    from torch._inductor.fx_passes import freezing_patterns, post_grad

    with scope_lock, contextlib.ExitStack() as stack:
        # What freezing registers at its first use may lengthen the list; that must be Inductor's own, and filtered.
        freezing_patterns.lazy_init()
        first, *rest = freezing_patterns.pass_patterns
        freezing = [_filtered(first, before=pipeline), *map(_filtered, rest)]
        stack.enter_context(replaced(freezing_patterns, "pass_patterns", freezing))
        lowering = [_filtered(p) for p in post_grad.pass_patterns]
        stack.enter_context(replaced(post_grad, "pass_patterns", lowering))
        stack.enter_context(replaced(compile_fx_module, "select_decomp_table", decompositions))
        stack.enter_context(_laid_out_operands())
        stack.enter_context(_channels_last_results())
        stack.enter_context(_constants_folded())
        stack.enter_context(_constants_once())
        stack.enter_context(_pools_without_headers())
        stack.enter_context(_sources_side_by_side())
        stack.enter_context(_eight_bytes_at_once())
        stack.enter_context(_values_remembered())
        stack.enter_context(linked_objects())
        yield


@contextlib.contextmanager
def _laid_out_operands() -> Iterator[None]:
    """Within this context two kinds of operators get operands that lie as they take them.

    The library's int8 max pool gets images with channels innermost: its fake kernel says that its result lies so, which
    holds where its input does; generated code asserts it. What a linear adds is a buffer: lowering leaves it an expression
    where nothing else reads it, such as a conversion, and then refuses it. Relies on lowering looking the constraints of
    an operator's inputs up in `lowering._maybe_layout_constraints`.
    """
    from torch._inductor import ir, lowering

    def channels_last(node: fx.Node, x: Any, *arguments: Any, **keywords: Any) -> tuple[Any, Any]:
        return (ir.ExternKernel.require_channels_last(x), *arguments), keywords

    def contiguous_addend(node: fx.Node, *arguments: Any, **keywords: Any) -> tuple[Any, Any]:
        return (*arguments[:6], ir.ExternKernel.require_contiguous(arguments[6]), *arguments[7:]), keywords

    linear = torch.ops.onednn.qlinear_pointwise
    constraints = {
        **lowering._maybe_layout_constraints,
        torch.ops.quantized.max_pool2d.default: channels_last,
        linear.binary: contiguous_addend,
        linear.binary_tensor: contiguous_addend,
    }
    with replaced(lowering, "_maybe_layout_constraints", constraints):
        yield


@contextlib.contextmanager
def _channels_last_results() -> Iterator[None]:
    """Within this context int8 convolutions are known to give channels innermost, whatever the batch size is.

    Inductor says otherwise of an input that is both contiguous and channels-last (one channel, or one pixel) and of a
    size not known when compiling, and the generated code then stops at the result's strides. Relies on
    `mkldnn_ir._prepare_convolution_fusion_create` asking `is_contiguous_storage_and_layout` for that only.
    """
    from torch._inductor import mkldnn_ir

    stock = mkldnn_ir.is_contiguous_storage_and_layout

    def is_contiguous(x: Any) -> bool:
        return x.get_dtype() not in (torch.uint8, torch.int8) and stock(x)

    with replaced(mkldnn_ir, "is_contiguous_storage_and_layout", is_contiguous):
        yield


# What is made with the help of constructors is stored where it has up to so many elements, and computed at each call above.
LARGEST_CONSTRUCTED = 2**20


@contextlib.contextmanager
def _constants_folded() -> Iterator[None]:
    """Within this context constant folding leaves weights quantized, and computes what is made of constructors.

    Stock computes the float form of each weight and throws it away. And it leaves masks that a model writes element by
    element at each call (windows of shifted attention) to generated code: half of such a network's compile time.
    Relies on `constant_fold` making a `ConstantFolder` of that name, on `run_node` computing by `_deduce_value` first
    and asking `is_impure` afterwards, on an impure node's result being `unknown_value` whatever was computed, and on
    `add_node_replacement` deciding what is stored.
    """
    from torch._inductor import constant_folding

    class Folder(constant_folding.ConstantFolder):
        def __init__(self, gm: fx.GraphModule, skip_constructors: bool = False, **others: Any) -> None:
            super().__init__(gm, skip_constructors and bool(others), **others)
            self.constructed: set[fx.Node] = set()

        def _deduce_value(self, node: fx.Node) -> Any:
            return self.unknown_value if self.is_impure(node) else super()._deduce_value(node)

        def add_node_replacement(self, node: fx.Node, tensor: torch.Tensor) -> None:
            inputs = node.all_input_nodes
            if not inputs or not self.constructed.isdisjoint(inputs):
                self.constructed.add(node)
                if not inputs or tensor.numel() > LARGEST_CONSTRUCTED:
                    return  # a constructor alone costs generated code nothing
            super().add_node_replacement(node, tensor)

    with replaced(constant_folding, "ConstantFolder", Folder):
        yield


@contextlib.contextmanager
def _values_remembered() -> Iterator[None]:
    """Within this context nodes whose operands look as before keep their fake values.

    Freezing computes all of them anew four times and lowering once more, which took a tenth of a compile. Relies on
    `compile_fx.fake_tensor_prop` making a `FakeTensorProp` of that name, and on what a pass copies or replaces coming
    without meta, or with the meta of the node that it equals.
    """
    from torch._inductor import compile_fx as compile_fx_module

    class Remembering(compile_fx_module.FakeTensorProp):
        def run_node(self, n: fx.Node) -> Any:
            operands = self._operands(n)
            if operands is not None and n.meta.get("x86q_operands") == operands and "val" in n.meta:
                return n.meta["val"]
            result = super().run_node(n)
            n.meta["x86q_operands"] = operands
            return result

        def _operands(self, n: fx.Node) -> Any:
            """All that a node's fake value depends on; None where that may be more than shapes, strides and types."""
            if n.op == "get_attr":
                return _described(self.fetch_attr(n.target))  # type: ignore[arg-type]
            if not isinstance(n.target, torch._ops.OpOverload) or n.target._schema.is_mutable or not n.all_input_nodes:
                return None
            operands = {operand: _described(operand.meta.get("val")) for operand in n.all_input_nodes}
            return None if None in operands.values() else (n.target, fx.map_arg((n.args, n.kwargs), operands.get))

    with replaced(compile_fx_module, "FakeTensorProp", Remembering):
        yield


def _described(value: Any) -> Any:
    """What operators can read off a tensor without its contents, hashable; None for one of unknown sizes or none."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    if any(type(size) is not int for size in (*value.shape, *value.stride())):
        return None
    return str((value.dtype, value.device, tuple(value.shape), value.stride(), value.storage_offset()))


@contextlib.contextmanager
def _pools_without_headers() -> Iterator[None]:
    """Within this context the library's int8 max pool is called through torch's stable C interface.

    Inductor calls operators that take lists through the dispatcher's C++ classes, whose headers take longer to compile
    than the function that calls them. Relies on `CppWrapperCpu.generate_fallback_kernel_with_runtime_lookup_boxed` writing
    that call, and on torch's `cpp_wrapper/common.h` including the stable interface.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    stock = CppWrapperCpu.generate_fallback_kernel_with_runtime_lookup_boxed

    def generate(self: Any, operator: Any, arguments: Sequence[Any], outputs: Sequence[Any], results: Any) -> None:
        if operator is not torch.ops.quantized.max_pool2d.default:
            return stock(self, operator, arguments, outputs, results)
        image, *windows, ceil_mode = arguments
        lists = (f"std::vector<int64_t>{{{', '.join(map(str, window))}}}" for window in windows)
        values = ", ".join(
            f"torch::stable::detail::from({value})" for value in ("image", *lists, str(ceil_mode).lower())
        )
        self.writelines(
            [
                f"RAIIAtenTensorHandle {outputs[0]};",
                "{",
                "    AtenTensorHandle image;",
                f"    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle({image.codegen_reference()}, &image));",
                f"    std::array<StableIValue, {len(arguments)}> stack{{{values}}};",
                "    AOTI_TORCH_ERROR_CODE_CHECK(",
                f'        torch_call_dispatcher("{operator._schema.name}", "", stack.data(), TORCH_ABI_VERSION));',
                f"    {outputs[0]} = torch::stable::detail::to<AtenTensorHandle>(stack[0]);",
                "}",
            ]
        )

    with replaced(CppWrapperCpu, stock.__name__, generate):
        yield


@contextlib.contextmanager
def headers_ahead(options: Mapping[str, Any]) -> Iterator[None]:
    """Within this context the headers that code generated under `options` includes are precompiled, beside all else.

    They are once per machine and set of flags, which takes longer than all the rest of a small model. Relies on
    `CppWrapperCodeCache.load_async` asking `codecache._precompile_header` for them and on its building nothing before what
    it returns is called; on what is precompiled already being passed over. Who needs a header reports what is wrong with it.
    """
    from torch._inductor import codecache, config

    stock, pool = codecache._precompile_header, ThreadPoolExecutor()

    def start(*arguments: Any, **keywords: Any) -> str:
        pool.submit(contextvars.copy_context().run, stock, *arguments, **keywords)
        return ""

    with config.patch(dict(options)), replaced(codecache, stock.__name__, start):
        if config.cpp_wrapper and config.cpp_wrapper_build_separate:
            codecache.CppWrapperCodeCache.load_async(
                "", "cpu", optimized_code="\n", needs_vec_isa=False, kernel_needs_vec_isa=True
            )
    with pool:
        yield


@contextlib.contextmanager
def _sources_side_by_side() -> Iterator[None]:
    """Within this context the function that calls the kernels is compiled at the same time as they are.

    Relies on `_worker_compile_cpp` building one file after the other, the last of which needs the others, on its passing
    over what is there, and on `codecache` looking it up in its own module.
    """
    from torch._inductor import codecache

    stock = codecache._worker_compile_cpp

    def build(lock: str, builders: Sequence[Any]) -> None:
        parts = builders[:-1]
        with ThreadPoolExecutor() as pool:
            list(pool.map(stock, [f"{lock}.{number}" for number in range(len(parts))], [(part,) for part in parts]))
        stock(lock, builders)

    with replaced(codecache, "_worker_compile_cpp", build):
        yield


@contextlib.contextmanager
def _eight_bytes_at_once() -> Iterator[None]:
    """Within this context code generated for AVX2 loads the eight bytes that make a vector of floats with one instruction.

    torch's own function writes 32 ones to memory, the bytes over them, and loads all of it, for which a CPU has to wait
    until the writes are done: most of the time of a kernel that stands between int8 layers. The ones stay, where integers
    divide. Relies on `CppVecKernel._get_vec_load_line` giving a load as that function's call with the number of elements.
    """
    from torch._inductor.codegen.cpp import CppVecKernel
    from torch._inductor.cpu_vec_isa import VecAVX2

    stock = CppVecKernel._get_vec_load_line
    call = re.compile(r"at::vec::Vectorized<(u?int8_t)>::loadu\((.+), static_cast<int64_t>\(8\)\)")

    def load_line(self: Any, *arguments: Any, **keywords: Any) -> str:
        line: str = stock(self, *arguments, **keywords)
        found = call.fullmatch(line)
        if not found or not isinstance(self.vec_isa, VecAVX2):
            return line
        eight = f"_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)({found[2]})))"
        return f"at::vec::Vectorized<{found[1]}>(_mm256_blend_epi32(_mm256_set1_epi8(1), {eight}, 3))"

    with replaced(CppVecKernel, "_get_vec_load_line", load_line):
        yield


@contextlib.contextmanager
def _constants_once() -> Iterator[None]:
    """Within this context constants of the same contents are one constant.

    Lowering makes a tensor of each call's scale and of each zero point, and most zero points are equal. Each constant
    costs at every call and when compiling, since all are passed to the generated function. Relies on every constant
    going through `GraphLowering.allocate_non_dup_const_name`, which returns its name, and on `current_node` being what is
    lowered then.
    """
    from torch._inductor.graph import GraphLowering

    stock = GraphLowering.allocate_non_dup_const_name

    def once(self: Any, name: str | None, data: torch.Tensor) -> str:
        if data.is_mkldnn or data.layout != torch.strided or data.numel() > 65536 or name in self.mutated_named_buffers:
            return stock(self, name, data)
        names: dict[Any, str] = self.__dict__.setdefault("_x86q_names", {})
        contents = data.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
        key = (data.dtype, data.shape, data.stride(), contents)
        if names.get(key) not in self.constants:  # as one that was taken out again
            names[key] = stock(self, name, data)
        return names[key]

    def allocate(self: Any, name: str | None, data: torch.Tensor) -> str:
        found = once(self, name, data)
        node = self.current_node
        readers(self, found).update(node.users if node.op == "get_attr" else [node])
        return found

    with replaced(GraphLowering, "allocate_non_dup_const_name", allocate):
        yield


def readers(graph: Any, constant: str) -> set[fx.Node]:
    """Who reads a constant of a graph that is being lowered, as far as is known by then."""
    known: dict[str, set[fx.Node]] = graph.__dict__.setdefault("_x86q_readers", {})
    return known.setdefault(constant, set())


@contextlib.contextmanager
def cacheable_constants() -> Iterator[None]:
    """Within this context Inductor's graph cache takes graphs with packed weights, and tells weights by their contents.

    Stock bypasses its cache for opaque mkldnn tensors since they cannot be pickled, though it only needs them in the
    key: a hit takes the constants from the graph at hand. Of other frozen weights stock puts shape and type into the
    key; what a lowering derived from their values would then come from another model.

    Relies on `CacheabilityValidator.check_tensor` refusing mkldnn tensors and nothing else, on
    `FxGraphCachePickler._reduce_tensor` making the key's part for a constant, and on freezing marking what it made.
    """
    from torch._inductor import codecache
    from torch._inductor.freezing_utils import is_frozen_param

    stock = codecache.FxGraphCachePickler._reduce_tensor

    def reduce_tensor(self: Any, tensor: torch.Tensor) -> Any:
        if tensor.is_mkldnn:
            # Its layout is left out: the kernels take any, and the bytes that describe it hold some never written.
            return _identity, ((tuple(tensor.shape), str(tensor.dtype), _digest(tensor)),)
        part = stock(self, tensor)
        return (_identity, ((part, _digest(tensor)),)) if is_frozen_param(tensor) else part

    with (
        replaced(codecache.FxGraphCachePickler, "_reduce_tensor", reduce_tensor),
        replaced(codecache.CacheabilityValidator, "check_tensor", staticmethod(lambda tensor: None)),
    ):
        yield


def _identity(value: Any) -> Any:
    return value


def _digest(tensor: torch.Tensor) -> bytes:
    """A hash of a CPU tensor's bytes, packed or strided."""
    if tensor.is_mkldnn:
        address, size = torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    else:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
    contents = (ctypes.c_ubyte * size).from_address(address) if size else b""
    return hashlib.blake2b(contents, digest_size=20).digest()
