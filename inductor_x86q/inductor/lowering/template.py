"""Kernels of ours in Inductor's hands: the function around their C++, where their result lies, how many threads they use.

Relies on `CppTemplate.generate` rendering a template's C++ and making a `CppTemplateCaller` of it, on a C++ wrapper
appending its kernels to `kernel_declarations` once all of them are rendered, on `allow_epilogue_fusion` keeping what
follows out of a kernel, on `NonOwningLayout`, the layout of a buffer whose memory is part of another's, and on a template's buffer
of `MultiOutputLayout` having its `MultiOutput`s allocated in front of it, which Inductor's grouped GEMM is made of.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch._inductor import config, ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_utils import cexpr_index
from torch._inductor.virtualized import V

from inductor_x86q.inductor import configuration
from inductor_x86q.inductor.lowering.placement import Pixels, buffer


class Template(CppTemplate):
    """A kernel that computes a buffer from others; which C++ does so, a subclass says.

    Args:
        name: that Inductor gives the kernel.
        inputs: the buffers that it reads, each once, by what they are called in its C++.
        layout: of the result, which is called `out`, or of the first where there are several.
        work: which threads share: multiply-accumulates, or whatever `per_thread` counts; Inductor's expression of it where it is
            not known when compiling.
        per_thread: how much of it makes a thread worth its while.
    """

    # The results' names in its C++, in order.
    results: Sequence[str] = ("out",)

    def __init__(
        self,
        name: str,
        inputs: Mapping[str, Any],
        layout: ir.Layout,
        work: Any,
        per_thread: int = configuration.MACS_PER_THREAD,
    ) -> None:
        self._work, self._per_thread = work, per_thread
        self._is_known = isinstance(work, int) or bool(work.is_number)
        threads = configuration.threads(int(work), per_thread) if self._is_known else 0
        super().__init__(name, list(inputs.values()), layout, threads)
        self._named = dict(inputs)

    @property
    def threads(self) -> int | str:
        """How many it uses, 0 for as many as there are when it runs; C++ where that is not known when compiling."""
        known: int = self.num_threads
        return known if self._is_known else configuration.threads_cpp(self.cpp(self._work), self._per_thread)

    def shared(self) -> Sequence[str]:
        """Texts of C++, each of which is needed once in a file, in front of its first kernel that needs it."""
        raise NotImplementedError

    def body(self, name: str) -> str:
        """The C++ inside of the function of that name."""
        raise NotImplementedError

    def cpp(self, size: Any) -> str:
        """The C++ of a size, known when compiling or not, inside of the function."""
        return str(size) if isinstance(size, int) else str(cexpr_index(self._kernel.rename_indexing(size)))

    def is_read(self, result: str) -> bool:
        """Whether anybody reads that result, or may do so; a parameter of the function is only what is."""
        return result in self._read

    def address(self, image: Pixels) -> str:
        """The C++ of where an image begins."""
        name = next(name for name, node in self._named.items() if node.get_name() == image.buffer.get_name())
        return f"{name} + {self.cpp(image.offset)}"

    def render(  # type: ignore[override]
        self, kernel: Any, template_buffer_node: Any = None, epilogue_nodes: Any = None, **_: Any
    ) -> str:
        """The kernel; `generate` has it rendered once without `template_buffer_node`, to know its arguments."""
        assert not epilogue_nodes
        is_final = template_buffer_node is not None
        if is_final:
            self.output_node = template_buffer_node
        self._kernel = kernel
        self._read = self._results_read()
        definition = kernel.def_kernel(inputs=self._named, outputs=self._read)
        name = kernel.kernel_name
        return f"""\
{self._shared_once() if is_final else ""}
extern "C" {definition}
{{
    {kernel.maybe_codegen_profile() if is_final else ""}
{textwrap.indent(self.body(name), "    ")}
}}
"""

    def _results_read(self) -> dict[str, Any]:
        buffers = getattr(self.output_node, "outputs", None) or [self.output_node]
        named = zip(self.results, buffers, strict=False)
        return {name: node for name, node in named if node.get_name() not in V.graph.removed_buffers}

    def _shared_once(self) -> str:
        """What is shared, for a kernel in a file of its own; of kernels in one file the first has it put in front of all."""
        texts = list(self.shared())
        if config.cpp.enable_kernel_profile:
            texts.insert(0, "#include <torch/csrc/inductor/aoti_runtime/utils.h>\n")
        if not V.graph.cpp_wrapper:
            return "".join(texts)
        wrapper: Any = V.graph.wrapper_code
        written = wrapper.__dict__.setdefault("_x86q_shared", set())
        for text in texts:
            if text not in written:
                wrapper.kernel_declarations.splice(text)
                written.add(text)
        return ""


def computed(box: Any, part: ir.ReinterpretView | None) -> Any:
    """The result of a kernel, which takes in nothing that follows; its memory is that part of a larger one, if any."""
    result = buffer(box)
    result.allow_epilogue_fusion = False
    if part is not None:
        result.layout = ir.NonOwningLayout(part)
    return box


def several(template: Template, layouts: Sequence[ir.Layout]) -> list[Any]:
    """The results of a kernel that has several, each a buffer of its own that need not be there if nobody reads it."""
    node = buffer(template.generate().output_node())
    node.allow_epilogue_fusion = False
    node.outputs = [ir.MultiOutput(layout, node, [(list, number)]) for number, layout in enumerate(layouts)]
    node.layout = ir.MultiOutputLayout(device=layouts[0].device)
    return [ir.TensorBox.create(output) for output in node.outputs]
