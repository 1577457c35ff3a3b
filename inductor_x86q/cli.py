"""The command line: `x86q doctor | explain | code | why | bench | coverage`, also as `python -m inductor_x86q`.

Exit codes: 0 done; 1 a layer was missed under --strict, or the doctor found what makes int8 wrong or impossible here;
2 the command line, the model or its inputs cannot be used as given (the message says why).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inductor_x86q.tools import bench, coverage

if TYPE_CHECKING:
    import torch

    from inductor_x86q.report import Report

DONE, FAILED, UNUSABLE = 0, 1, 2

_MODELS = """\
MODEL is one of
  torchvision:resnet18       a torchvision model with random weights (needs torchvision)
  package.module:factory     what factory() returns: a torch.nn.Module; the current directory is searched first
  model.pt2                  a program saved by torch.export.save, or for `explain` a package made by `package`

A model that is quantized already (its graph has quantize/dequantize nodes) is taken as it is. A float model is
quantized with random calibration data: kernels and times are those of real data, results are not.
"""
_EXITS = "exit codes: 0 done, 1 something was missed under --strict, 2 the model or its inputs cannot be used as given"


class Unusable(Exception):
    """What was given on the command line cannot be used; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        with _quiet():
            return parsed.run(parsed)
    except Unusable as error:
        print(f"x86q {parsed.command}: {error}", file=sys.stderr)
        return UNUSABLE
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("x86q", description="int8 for TorchInductor on x86 CPUs", formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="what int8 will use on this machine, and at what risk",
        description="Reports CPU, compiler and versions, and what int8 will use here.\n\n"
        "exit codes: 0 all is well or slower than it could be, 1 int8 cannot be compiled here",
        formatter_class=raw,
    )
    doctor.set_defaults(run=_doctor)

    explain = _on_model(commands, "explain", _explain, "which kernel each layer becomes, and why not where it does not")
    explain.add_argument("--strict", action="store_true", help="exit with 1 when a layer that should be int8 is not")
    explain.add_argument("--timing", action="store_true", help="compile, and measure each kernel")
    explain.add_argument("--drift", action="store_true", help="measure how far each layer is from float32")
    explain.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON ('-': to standard output)")
    explain.add_argument("--html", metavar="FILE", type=Path, help="write the report as one self-contained page")
    explain.add_argument(
        "--model-explorer", metavar="FILE", type=Path, help="write the graph as JSON for model-explorer"
    )
    explain.add_argument("--code", action="store_true", help="put the generated C++ of each layer into both files")
    explain.add_argument(
        "--compare",
        metavar="FILE",
        type=Path,
        help="a report written by --json before: the page shows what has changed",
    )

    code = _on_model(commands, "code", _code, "the generated C++, with a comment at each call that names its layers")
    code.add_argument("--layer", metavar="PATH", help="only what serves this layer, e.g. layer1.0.conv1")
    code.add_argument(
        "--stable", action="store_true", help="without what differs between machines and versions of torch"
    )
    code.add_argument("--output", metavar="FILE", type=Path, help="write it there")

    why = _on_model(commands, "why", _why, "why each rule that could apply to a node did not, stage by stage")
    why.add_argument(
        "--node", metavar="NAME", required=True, help="a node's name in a stage's graph, or a layer's path"
    )
    bench.add_command(commands)
    coverage.add_command(commands)
    return parser


def _on_model(commands: Any, name: str, run: Callable[[Any], int], help: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=help, description=f"Tells {help}.\n\n{_MODELS}", epilog=_EXITS, formatter_class=raw
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
    parser.set_defaults(run=run)
    return parser


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the user's screen what torch and torchao say on import and on compile, and what our report says too."""
    loggers = [logging.getLogger(name) for name in ("torch", "torchao", "inductor_x86q")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# --- commands ---------------------------------------------------------------------------------------------------------


def _explain(parsed: Any) -> int:
    before = _read_report(parsed.compare) if parsed.compare else None
    report = _stored_report(parsed) or _computed_report(parsed)
    if parsed.json != Path("-"):
        print(report)
    if parsed.json is not None:
        _write(parsed.json, report.to_json() + "\n")
    if parsed.model_explorer is not None:
        _write(parsed.model_explorer, report.to_model_explorer(parsed.model) + "\n")
    if parsed.html is not None:
        _write(parsed.html, report.to_html(parsed.model, compare=before) + "\n")
    return FAILED if parsed.strict and report.missed else DONE


def _read_report(path: Path) -> Report:
    from inductor_x86q.report import Report

    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unusable(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Unusable(f"{path} cannot be compared with: {error}") from error


def _stored_report(parsed: Any) -> Report | None:
    """The report inside MODEL where that is a package; None for any other MODEL."""
    from inductor_x86q import aot

    if not parsed.model.endswith(".pt2") or not aot.is_package(parsed.model):
        return None
    given = [name for name in ("input", "mode", "option", "timing", "code") if getattr(parsed, name)]
    if given:
        raise Unusable(f"{parsed.model!r} is a package, compiled already: --{given[0]} needs the model it was made of")
    with _step("reading the package"):
        return aot.read_report(parsed.model)


def _computed_report(parsed: Any) -> Report:
    from inductor_x86q import inspection

    model, inputs, original = _loaded(parsed)
    drift = parsed.drift and (original or True)
    with _step("compiling and measuring" if parsed.timing else "running the passes"):
        return inspection.explain(
            model, inputs, timing=parsed.timing, drift=drift, code=parsed.code, **_compile_arguments(parsed)
        )


def _code(parsed: Any) -> int:
    from inductor_x86q import inspection
    from inductor_x86q.inductor import cpp_text

    model, inputs = _quantized(parsed)
    with _step("generating code"):
        code = inspection.cpp_code(
            model, inputs, layer=None if parsed.stable else parsed.layer, **_compile_arguments(parsed)
        )
    if parsed.stable:
        code = cpp_text.stable(code)
    _write(parsed.output or Path("-"), code)
    return DONE


def _why(parsed: Any) -> int:
    from inductor_x86q import inspection

    model, inputs = _quantized(parsed)
    with _step("running the passes"):
        answers = inspection.why(model, inputs, parsed.node, **_compile_arguments(parsed))
    for stage in dict.fromkeys(answer.stage for answer in answers):
        print(stage)
        for answer in answers:
            if answer.stage == stage:
                rule = f"rule {answer.rule!r}: " if answer.rule else ""
                print(f"  {answer.node} ({answer.operator}): {rule}{answer.why}")
    return DONE


def _doctor(parsed: Any) -> int:
    with _step("looking"):
        facts, advice, usable = diagnose()
    width = max(len(name) for name, _ in facts)
    for name, fact in facts:
        print(f"{name.ljust(width)}  {fact}")
    print()
    for line in advice:
        print(f"- {line}")
    return DONE if usable else FAILED


def diagnose() -> tuple[list[tuple[str, str]], list[str], bool]:
    """Facts about this machine as (name, text), what follows from them for int8, and whether int8 can be compiled."""
    import torch

    from inductor_x86q import __version__, cpu
    from inductor_x86q.inductor import configuration

    flags = cpu.flags()
    yes = {True: "yes", False: "no"}
    facts = [
        ("CPU", _cpu_name()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("AVX2", yes["avx2" in flags]),
        ("AVX-512", yes["avx512f" in flags]),
        ("VNNI", yes[cpu.has_vnni()]),
        ("AMX int8", yes[cpu.has_amx()]),
        ("bf16", yes[cpu.has_bf16()]),
        ("inductor_x86q", __version__),
        ("torch", torch.__version__),
        ("torchao", _version("torchao")),
    ]
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        facts.append(("ONEDNN_MAX_CPU_ISA", f"{limit} (limits what oneDNN uses)"))
    advice, usable = _advice(cpu), True
    try:
        facts.append(("C++ compiler", configuration.cxx_compiler()))
    except RuntimeError as error:
        facts.append(("C++ compiler", "none"))
        advice.insert(0, str(error))
        usable = False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        advice.insert(0, f"this machine is {platform.machine()}, not x86-64: the int8 kernels are not available")
        usable = False
    return facts, advice, usable


def _advice(cpu: Any) -> list[str]:
    if cpu.has_amx():
        kernels = "AMX tiles: int8 runs at its fastest"
    elif cpu.has_vnni():
        kernels = "VNNI dot products: int8 runs at full speed, with 8-bit activations"
    else:
        kernels = (
            "int8 without VNNI: pairs of products are added in 16 bits, which can overflow. quantize() keeps each "
            "layer's input or weight to 7 bits here (reduce_range); layers of 8-bit inputs and 8-bit weights stay float"
        )
    return [kernels] + ([] if cpu.has_bf16() else ["no bf16 kernels: int8 layers produce int8 or fp32 here"])


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed: pip install torchao"


# --- models and inputs ------------------------------------------------------------------------------------------------


def _quantized(parsed: Any) -> tuple[Any, tuple[Any, ...]]:
    """The quantized model of the command line, and inputs for it."""
    return _loaded(parsed)[:2]


def _loaded(parsed: Any) -> tuple[Any, tuple[Any, ...], Any]:
    """The same, and the float model that was quantized here; None where it was quantized before."""
    import torch

    from inductor_x86q.errors import QuantizationError
    from inductor_x86q.quantization.pt2e import quantize

    torch.manual_seed(0)
    with _step("loading the model"):
        model, own_inputs = load(parsed.model)
    inputs = tuple(map(_input, parsed.input)) or own_inputs or (_input("1x3x224x224"),)
    if _is_quantized(model):
        return model, inputs, None
    print(f"{parsed.model} is a float model: quantized here with random calibration data", file=sys.stderr)
    with _step("quantizing"):
        try:
            return quantize(model, inputs, calibration=[inputs]), inputs, model
        except QuantizationError as error:
            raise Unusable(str(error)) from error
        except Exception as error:  # whatever export or the model itself raises
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise Unusable(
                f"{parsed.model} cannot be quantized with inputs of shape {shapes}: {_first_line(error)}"
            ) from error


def load(model: str) -> tuple[Any, tuple[Any, ...] | None]:
    """The module that a MODEL of the command line stands for, and its own example inputs where it has some."""
    import torch

    if model.endswith(".pt2"):
        try:
            program = torch.export.load(model)
        except FileNotFoundError as error:
            raise Unusable(f"there is no file {model!r}") from error
        except Exception as error:
            raise Unusable(f"{model!r} is not a program saved by torch.export.save: {_first_line(error)}") from error
        return program.module(), program.example_inputs[0] if program.example_inputs else None
    if ":" not in model:
        raise Unusable(
            f"MODEL is {model!r}: expected torchvision:NAME, package.module:factory or a file that ends in .pt2"
        )
    package, _, name = model.partition(":")
    found = _torchvision(name) if package == "torchvision" else _factory(package, name)
    if not isinstance(found, torch.nn.Module):
        raise Unusable(f"{model} gave a {type(found).__name__}: expected a torch.nn.Module")
    return (found if isinstance(found, torch.fx.GraphModule) else found.eval()), None


def _torchvision(name: str) -> Any:
    try:
        from torchvision import models
    except ImportError as error:
        raise Unusable(
            f"torchvision cannot be imported ({_first_line(error)}): pip install inductor-x86q[models]"
        ) from error
    try:
        builder = models.get_model_builder(name)
        backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
        return builder(weights=None, **backbone)
    except ValueError as error:
        raise Unusable(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them") from error


def _factory(package: str, name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise Unusable(f"module {package!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise Unusable(f"module {package!r} has no {name!r}") from error
    finally:
        sys.path.remove(os.getcwd())
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


def _compile_arguments(parsed: Any) -> dict[str, Any]:
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


# --- output -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    """Says on a terminal what takes its time, and how long it took; turns the package's own errors into Unusable."""
    from inductor_x86q.errors import CompileError

    shown = sys.stderr.isatty()
    started = time.perf_counter()
    if shown:
        print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    except CompileError as error:
        raise Unusable(str(error)) from error
    except Exception as error:
        if cause := _of_ours(error):
            raise Unusable(str(cause)) from error
        raise
    finally:
        if shown:
            print(f" {time.perf_counter() - started:.1f} s", file=sys.stderr)


def _of_ours(error: BaseException | None) -> BaseException | None:
    """The CompileError that torch wrapped in an error of its own, None if there is none."""
    from inductor_x86q.errors import CompileError

    while error is not None:
        error = getattr(error, "inner_exception", None) or error.__cause__
        if isinstance(error, CompileError):
            return error
    return None


def _write(path: Path, content: str) -> None:
    if path == Path("-"):
        sys.stdout.write(content)
        return
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise Unusable(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote {path}", file=sys.stderr)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
