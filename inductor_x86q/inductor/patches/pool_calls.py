"""The library's int8 max pool is called through torch's stable C interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs


def _generate(
    stock: Callable[..., None],
    wrapper: Any,
    operator: Any,
    arguments: Sequence[Any],
    outputs: Sequence[Any],
    results: Any,
) -> None:
    if operator is not torch.ops.quantized.max_pool2d.default:
        return stock(wrapper, operator, arguments, outputs, results)
    image, *windows, ceil_mode = arguments
    lists = (f"std::vector<int64_t>{{{', '.join(map(str, window))}}}" for window in windows)
    values = ", ".join(f"torch::stable::detail::from({value})" for value in ("image", *lists, str(ceil_mode).lower()))
    wrapper.writelines(
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
    return None


_WRAPPER = (
    "torch._inductor.codegen.cpp_wrapper_cpu",
    "CppWrapperCpu.generate_fallback_kernel_with_runtime_lookup_boxed",
)

PATCHES = (
    Patch(
        scope=COMPILE,
        module=_WRAPPER[0],
        attribute=_WRAPPER[1],
        replacement=_generate,
        why="Inductor calls operators that take lists through the dispatcher's C++ classes, whose headers take longer to compile "
        "than the function that calls them.",
        since="2.13",
        until="Inductor calls them through `torch_call_dispatcher` itself, as it does those without lists, or the operator has "
        "a C shim. None filed; the headers' cost is pytorch/pytorch#142005.",
        instead="`aot_inductor.custom_ops_to_c_shims` needs a shim compiled into a library of ours.",
        relies_on="This method writing the call, and `cpp_wrapper/common.h` including the stable interface.",
        needs=(Needs(*_WRAPPER, parameters=("op_overload", "raw_args", "output_args")),),
    ),
)
