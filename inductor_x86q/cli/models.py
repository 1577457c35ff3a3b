"""MODEL and its inputs, as they are written on the command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inductor_x86q.cli.output import EXITS, Unusable, first_line, step

if TYPE_CHECKING:
    import torch

_MODELS = """\
MODEL is one of
  torchvision:resnet18       a torchvision model with random weights (needs torchvision)
  package.module:factory     what factory() returns: a torch.nn.Module; the current directory is searched first
  model.pt2                  a program saved by torch.export.save, or for `explain` a package made by `package`

A model that is quantized already (its graph has quantize/dequantize nodes) is taken as it is. A float model is
quantized with random calibration data: kernels and times are those of real data, results are not.

A file can run code of whoever made it: a saved program when it is unpickled or evaluated, a package when it is loaded. Of
a package only the report is read here. A program is refused where loading takes more than its tensors and its graph of
tensor operators, unless --trust is given.
"""


def add_parser(commands: Any, name: str, run: Callable[[Any], int], help: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=help, description=f"Tells {help}.\n\n{_MODELS}", epilog=EXITS, formatter_class=raw
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--input",
        metavar="SHAPE[:TYPE]",
        action="append",
        default=[],
        help="an input's shape, e.g. 1x3x224x224 or 1x128:int64; once per input. Default: the saved program's own "
        "example, or 1x3x224x224",
    )
    parser.add_argument("--mode", help="a mode of torch.compile, e.g. max-autotune")
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option of Inductor, e.g. cpp.simdlen=256; may be repeated",
    )
    parser.add_argument(
        "--trust", action="store_true", help="load a saved program that can run code: only if you trust who made it"
    )
    parser.set_defaults(run=run)
    return parser


def load_quantized(parsed: Any) -> tuple[Any, tuple[Any, ...], Any]:
    """The quantized model, inputs for it, and the float model that was quantized here; None where it was before."""
    model, inputs = _load_with_inputs(parsed)
    if _is_quantized(model):
        return model, inputs, None
    print(f"{parsed.model} is a float model: quantized here with random calibration data", file=sys.stderr)
    return _quantized(parsed, model, inputs, calibration=[inputs]), inputs, model


def load_tuned(parsed: Any) -> tuple[Any, tuple[Any, ...]]:
    """The model in int8 within a budget of accuracy, and inputs for it; raises BudgetError where there is no such one."""
    model, inputs = _load_with_inputs(parsed)
    if _is_quantized(model):
        raise Unusable(f"{parsed.model} is quantized already: a budget is for the float model")
    if parsed.data is None:
        print("no --data: calibrated with random data, which says little of accuracy", file=sys.stderr)
    calibration = [inputs] if parsed.data is None else _called(_named(parsed.data, "--data"))
    validate = None if parsed.validate is None else _named(parsed.validate, "--validate")
    options = {"calibration": calibration, "validate": validate, "max_drop": parsed.max_drop}
    return _quantized(parsed, model, inputs, **options), inputs


def _load_with_inputs(parsed: Any) -> tuple[Any, tuple[Any, ...]]:
    import torch

    torch.manual_seed(0)
    with step("loading the model"):
        model, own_inputs = _load(parsed.model, parsed.trust)
    return model, tuple(map(_input, parsed.input)) or own_inputs or (_input("1x3x224x224"),)


def _quantized(parsed: Any, model: Any, inputs: tuple[Any, ...], **options: Any) -> Any:
    from inductor_x86q.accuracy.budget import quantize
    from inductor_x86q.errors import BudgetError, QuantizationError

    with step("quantizing"):
        try:
            return quantize(model, inputs, **options)
        except BudgetError:
            raise
        except QuantizationError as error:
            raise Unusable(str(error)) from error
        except Exception as error:  # whatever export or the model itself raises
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise Unusable(
                f"{parsed.model} cannot be quantized with inputs of shape {shapes}: {first_line(error)}"
            ) from error


def _load(model: str, trust: bool) -> tuple[Any, tuple[Any, ...] | None]:
    """The module that a MODEL of the command line stands for, and its own example inputs where it has some."""
    import torch

    if model.endswith(".pt2"):
        return _program(model, trust)
    if ":" not in model:
        raise Unusable(
            f"MODEL is {model!r}: expected torchvision:NAME, package.module:factory or a file that ends in .pt2"
        )
    package, _, name = model.partition(":")
    found = _torchvision(name) if package == "torchvision" else _called(_imported(package, name))
    if not isinstance(found, torch.nn.Module):
        raise Unusable(f"{model} gave a {type(found).__name__}: expected a torch.nn.Module")
    return (found if isinstance(found, torch.fx.GraphModule) else found.eval()), None


def _program(path: str, trust: bool) -> tuple[Any, tuple[Any, ...] | None]:
    import torch

    from inductor_x86q import aot
    from inductor_x86q.inductor import saved_programs

    if not Path(path).is_file():
        raise Unusable(f"there is no file {path!r}")
    if aot.is_package(path):
        raise Unusable(f"{path!r} is a package, compiled already: only `x86q explain` reads it, the report inside")
    try:
        obstacle = "" if trust else saved_programs.obstacle(path)
        if not obstacle:
            program = torch.export.load(path)
            return program.module(), program.example_inputs[0] if program.example_inputs else None
    except Exception as error:
        raise Unusable(f"{path!r} is not a program saved by torch.export.save: {first_line(error)}") from error
    raise Unusable(f"{path!r} could run code when it is loaded: {obstacle}. Give --trust if you trust who made it")


def _torchvision(name: str) -> Any:
    try:
        from torchvision import models
    except ImportError as error:
        raise Unusable(
            f"torchvision cannot be imported ({first_line(error)}): pip install inductor-x86q[models]"
        ) from error
    try:
        builder = models.get_model_builder(name)
        backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
        return builder(weights=None, **backbone)
    except ValueError as error:
        raise Unusable(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them") from error


def _named(text: str, option: str) -> Any:
    package, colon, name = text.partition(":")
    if not colon:
        raise Unusable(f"{option} is {text!r}: expected package.module:name")
    return _imported(package, name)


def _imported(package: str, name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise Unusable(f"module {package!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise Unusable(f"module {package!r} has no {name!r}") from error
    finally:
        sys.path.remove(os.getcwd())


def _called(found: Any) -> Any:
    """What a factory returns; anything else is that itself."""
    return found() if callable(found) and not _is_module(found) else found


def _is_module(value: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _is_quantized(model: Any) -> bool:
    import torch

    from inductor_x86q.graph import qdq

    return isinstance(model, torch.fx.GraphModule) and any(
        qdq.is_quantize(node) or qdq.is_dequantize(node) for node in model.graph.nodes
    )


def _input(text: str) -> torch.Tensor:
    """A random tensor of a shape and type as written on the command line: 1x3x224x224, 1x128:int64."""
    import torch

    shape, _, type_name = text.partition(":")
    dtype = getattr(torch, type_name or "float32", None)
    try:
        sizes = [int(size) for size in shape.split("x")] if shape else []
    except ValueError:
        sizes = [-1]
    if not isinstance(dtype, torch.dtype) or min(sizes, default=0) < 0:
        raise Unusable(
            f"--input {text!r}: expected a shape as 1x3x224x224, with a type behind a colon where it is not float32"
        )
    return torch.randn(sizes).to(dtype) if dtype.is_floating_point else torch.zeros(sizes, dtype=dtype)


def compile_arguments(parsed: Any) -> dict[str, Any]:
    options = {}
    for item in parsed.option:
        name, equals, value = item.partition("=")
        if not equals:
            raise Unusable(f"--option {item!r}: expected NAME=VALUE")
        options[name] = _value(value)
    return {"mode": parsed.mode, "options": options}


def _value(text: str) -> Any:
    if text in ("True", "False", "true", "false", "None"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
