"""Compiles of others at the same time as ours, in other threads: torch's own, whatever ours does."""

from __future__ import annotations

import contextvars
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.pattern_matcher import PatternMatcherPass

from inductor_x86q import No, Rule, StrictError, backend, inspection, register_pass, testing
from inductor_x86q.inductor import wrapper_source
from inductor_x86q.inductor.patches.patch import Patch, Scope
from inductor_x86q.testing import QConv2d, QLinear, quantize_dequantize
from tests.stock import comparable

SECONDS = 120  # after which a test fails that waits for the other thread


class Block(nn.Module):
    """int8 layers, an activation that ours keep whole, and a float layer behind a quantize: a miss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.missed = QConv2d(8, 16, 1), QLinear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.conv(quantize_dequantize(x, 0.02, 60))).mean((2, 3))
        x = torch.relu(self.linear(quantize_dequantize(x, 0.02, 60)))
        return self.missed(quantize_dequantize(x, 0.02, 0))


X = torch.linspace(-1, 1, 2 * 8 * 36).reshape(2, 8, 6, 6)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return testing.qdq_graph(Block().eval(), (X,))


class Pause:
    """Where one thread waits for the other: `reached` it is by the one, `over` when the other says so."""

    def __init__(self) -> None:
        self.reached, self.over = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.over.wait(SECONDS), "the other thread did not end"


@pytest.fixture
def pause() -> Iterator[Pause]:
    """The first quantize that the passes see is where ours waits."""
    pause, anchor = Pause(), torch.ops.quantized_decomposed.quantize_per_tensor.default

    def find(node: fx.Node) -> No:
        pause()
        return No("it is only looked at")

    remove = register_pass("normalize", Rule("pause", (anchor,), find, lambda node, found: None))
    yield pause
    pause.over.set()
    remove()


def stock_code(model: fx.GraphModule) -> list[str]:
    """What Inductor generates with the global freezing flag, to be compared.

    Not through Dynamo, where it would wait for ours: as somebody compiles ahead of time.
    """
    with (
        torch.no_grad(),
        torch._inductor.config.patch(freezing=True),
        wrapper_source.generated_code() as parts,
    ):
        compile_fx(copy.deepcopy(model), [X])
    return [comparable(part.code) for part in parts]


def strictly_ours(model: fx.GraphModule) -> str:
    """By the backend itself."""
    with torch.no_grad(), pytest.raises(StrictError) as raised:
        backend.inductor_x86q(copy.deepcopy(model), [X], options={"strict": True})
    return str(raised.value)


def side_by_side(first: Callable[[], Any], pause: Pause, second: Callable[[], Any]) -> tuple[Any, Any]:
    """What both give, where `second` is run as a whole while `first` waits."""
    with ThreadPoolExecutor() as pool:
        started = pool.submit(first)
        while not pause.reached.wait(0.1):
            if started.done():
                started.result()
                pytest.fail("it ended without waiting")
        try:
            during = pool.submit(second).result(SECONDS)
        finally:
            pause.over.set()
        return started.result(SECONDS), during


def test_a_plain_compile_while_ours_runs_its_passes(graph: fx.GraphModule, pause: Pause) -> None:
    alone = stock_code(graph)
    error, during = side_by_side(lambda: strictly_ours(graph), pause, lambda: stock_code(graph))
    assert "missed" in error
    assert during == alone


def test_ours_while_a_plain_compile_is_under_way(graph: fx.GraphModule) -> None:
    """It began before ours replaced anything, and ends when all of it is put back."""
    pause = _Waits.pause = Pause()
    alone = stock_code(graph)

    def waiting() -> list[str]:
        with torch._inductor.config.patch(pre_grad_custom_pass=_Waits()):
            return stock_code(graph)

    before = PatternMatcherPass.apply
    code, error = side_by_side(waiting, pause, lambda: strictly_ours(graph))
    assert "missed" in error
    assert code == alone
    assert PatternMatcherPass.apply is before


class _Waits(torch._inductor.custom_graph_pass.CustomGraphPass):
    pause: Pause  # of the class: the options that a pass stands in are copied

    def __call__(self, graph: fx.Graph) -> None:
        self.pause()

    def uuid(self) -> None:
        return None


def test_source_is_collected_from_ones_own_thread(graph: fx.GraphModule, pause: Pause) -> None:
    def collected(compile: Callable[[], Any]) -> list[str]:
        with torch.no_grad(), wrapper_source.generated_code() as found:
            compile()
        return [part.code for part in found]

    def ours() -> list[str]:
        return collected(lambda: backend.inductor_x86q(copy.deepcopy(graph), [X], options={"kernels": "onednn"}))

    def plain() -> list[str]:
        return collected(lambda: compile_fx(copy.deepcopy(graph), [X]))

    first, second = side_by_side(ours, pause, plain)
    assert len(second) == 1 and "qconv_pointwise" not in second[0]
    assert len(first) == 1 and "qconv_pointwise" in first[0]


def test_through_dynamo_nobody_compiles_beside_ours(graph: fx.GraphModule, pause: Pause) -> None:
    """Names of layers, and whether torch.compile does anything at all, are of the whole process in torch."""
    with ThreadPoolExecutor() as pool:
        ours = pool.submit(strictly_ours, graph)
        assert pause.reached.wait(SECONDS)
        plain = pool.submit(torch.no_grad()(torch.compile(graph)), X)
        explained = pool.submit(inspection.explain, graph, (X,))
        with pytest.raises(TimeoutError):
            plain.result(0.5)
        pause.over.set()
        assert "missed" in ours.result(SECONDS)
        assert len(explained.result(SECONDS).missed) == 1
        with torch.no_grad():
            testing.assert_same(plain.result(SECONDS), graph(X), min_snr=30)


def test_two_of_ours_at_once(graph: fx.GraphModule) -> None:
    """They take turns; neither sees the other's graph, nor ends with the other's error."""
    both = threading.Barrier(2)

    def packaged() -> str:
        both.wait(SECONDS)
        return strictly_ours(graph)

    def fused() -> Any:
        both.wait(SECONDS)
        return inspection.run_fused(graph, (X,))

    with ThreadPoolExecutor() as pool:
        first, second = pool.submit(packaged), pool.submit(fused)
        error, (result, report) = first.result(SECONDS), second.result(SECONDS)
    assert "missed" in error and len(report.missed) == 1
    with torch.no_grad():
        testing.assert_same(result, graph(X), min_snr=30)


# --- a patch by itself ------------------------------------------------------------------------------------------------


class Torch:
    """What is replaced."""

    hook = None
    names: tuple[str, ...] = ("torch",)

    @classmethod
    def named(cls, name: str) -> bool:
        return name in cls.names

    def value(self) -> int:
        return 1


def patch(attribute: str, replacement: Callable[..., Any], kind: Callable[..., Any] | None = None) -> Patch:
    words = dict.fromkeys(("why", "since", "until", "instead", "relies_on"), "")
    return Patch(Scope("test"), __name__, f"Torch.{attribute}", replacement, **words, kind=kind)


def test_a_patch_is_in_force_in_its_scope_alone() -> None:
    stock, ten_more = Torch.value, patch("value", lambda stock, self: stock(self) + 10)
    with ten_more.scope.entered(True, [ten_more]):
        assert Torch().value() == 11
        with ThreadPoolExecutor() as pool:
            assert pool.submit(lambda: Torch().value()).result() == 1
            assert pool.submit(contextvars.copy_context().run, lambda: Torch().value()).result() == 11
            with ten_more.scope.entered(True, [ten_more]):
                assert Torch().value() == 11
        assert Torch().value() == 11
    assert Torch.value is stock


def test_a_hook_that_nobody_has_set() -> None:
    found: list[Any] = []
    hooked = patch("hook", lambda stock, value: found.append((stock(value), value)), kind=staticmethod)
    with hooked.scope.entered(True, [hooked]):
        Torch.hook(3)  # type: ignore[misc]
        with ThreadPoolExecutor() as pool:
            assert pool.submit(Torch.hook, 4).result() is None  # type: ignore[arg-type]
    assert found == [(None, 3)] and Torch.hook is None


def test_a_class_method() -> None:
    class Other(Torch):
        names = ("other",)

    stock = vars(Torch)["named"]
    negated = patch("named", lambda stock, cls, name: not stock(cls, name), kind=classmethod)
    with negated.scope.entered(True, [negated]):
        assert not Torch.named("torch") and Torch.named("other") and not Other.named("other")
        with ThreadPoolExecutor() as pool:
            assert pool.submit(Other.named, "other").result()
    assert vars(Torch)["named"] is stock and Torch.named("torch")


def test_who_overlaps_ours_and_puts_it_back_leaves_nothing_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody takes ours for torch's own, and puts it back when we are gone."""
    stock, ten_more = Torch.value, patch("value", lambda stock, self: stock(self) + 10)
    with monkeypatch.context() as patcher:
        with ten_more.scope.entered(True, [ten_more]):
            patcher.setattr(Torch, "value", lambda self: 7)
        assert Torch().value() == 7
    assert Torch.value is not stock and Torch().value() == 1
    with ten_more.scope.entered(True, [ten_more]):
        assert Torch().value() == 11
    assert Torch.value is stock


def test_who_overlaps_ours_and_stays_is_called_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around what stood there when they came, which must not be in force once more."""
    ten_more = patch("value", lambda stock, self: stock(self) + 10)
    with ten_more.scope.entered(True, [ten_more]):
        inner = Torch.value

        @functools.wraps(inner)
        def outer(self: Torch) -> int:
            return inner(self) + 100

        monkeypatch.setattr(Torch, "value", outer)
        assert Torch().value() == 111
    assert Torch().value() == 101
    with ten_more.scope.entered(True, [ten_more]):
        assert Torch().value() == 111
    assert Torch.value is outer
