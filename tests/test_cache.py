"""Inductor's graph cache across processes: what hits, and what must not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inductor_x86q import passes
from inductor_x86q.version import sources_digest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import inductor_x86q
from inductor_x86q import passes

seed, options, drop = json.loads(sys.argv[1])
if drop:
    passes.STAGES[3].rules.pop()

torch.manual_seed(seed)
net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))
x = torch.linspace(-1, 1, 2 * 3 * 36).reshape(2, 3, 6, 6)
for layer in net:  # the scales are numbers in the graph: weights differ, ranges do not
    if hasattr(layer, "weight"):
        layer.weight.data.clamp_(-0.1, 0.1)
        layer.weight.data.flatten(1)[:, 0] = 0.1
        layer.bias.data.zero_()
q = inductor_x86q.quantize(net.eval(), (x,), calibration=[x], reduce_range=True)
for node in q.graph.nodes:
    if "quantize_per_tensor" in str(node.target):
        node.args = (node.args[0], 0.02, 30, *node.args[3:])
q.recompile()
with torch.no_grad():
    result = torch.compile(q, backend="inductor_x86q", dynamic=False, options=options)(x)
reference = q(x)
print(json.dumps({
    "hit": counters["inductor"]["fxgraph_cache_hit"], "miss": counters["inductor"]["fxgraph_cache_miss"],
    "bypass": counters["inductor"]["fxgraph_cache_bypass"],
    "result": result.tolist(), "error": float((result - reference).abs().max()), "size": float(reference.abs().max()),
}))
"""


def compile_once(
    directory: Path, *, seed: int = 0, options: Any = None, drop: bool = False, root: Path = ROOT
) -> dict[str, Any]:
    """Compiles in a process of its own, with its caches in `directory`, by the package that lies in `root`."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(directory)}
    command = [sys.executable, "-c", PROGRAM, json.dumps([seed, options or {}, drop])]
    out = subprocess.run(
        command, env=environment, cwd=root, check=True, capture_output=True, text=True, timeout=600
    ).stdout
    return json.loads(out.splitlines()[-1])


def copied(root: Path) -> Path:
    """`root`, with a copy of the package in it."""
    shutil.copytree(ROOT / "inductor_x86q", root / "inductor_x86q", ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A cache directory in which one process has compiled, and what that process saw."""
    directory = tmp_path_factory.mktemp("caches")
    return directory, compile_once(directory)


def outcome(done: dict[str, Any]) -> tuple[int, int, int]:
    return done["hit"], done["miss"], done["bypass"]


def test_the_first_compile_misses(caches):
    _, first = caches
    assert outcome(first) == (0, 1, 0)
    assert first["error"] < 0.01 * first["size"]


def test_another_file_is_another_digest_and_the_same_files_elsewhere_are_the_same(tmp_path):
    package = copied(tmp_path) / "inductor_x86q"
    unchanged = sources_digest(ROOT / "inductor_x86q")
    assert sources_digest.__wrapped__(package) == unchanged
    files = sorted([*package.rglob("*.py"), *package.rglob("*.h"), package / "kernels" / "weights.json"])
    assert {"vector.h", "pool.py", "spelling.py", "backend.py"} <= {file.name for file in files}
    for file in files:
        contents = file.read_bytes()
        file.write_bytes(contents + b"\n")
        assert sources_digest.__wrapped__(package) != unchanged, file
        file.write_bytes(contents)
    files[0].rename(files[0].with_name("other.py"))
    assert sources_digest.__wrapped__(package) != unchanged


def test_a_rule_of_somebody_elses_is_known_by_its_source(tmp_path):
    def fingerprint(source: str) -> str:
        file = tmp_path / "rules.py"
        file.write_text(source)
        rules = {"__name__": "rules"}
        exec(compile(source, str(file), "exec"), rules)
        remove = passes.register_pass("finish", passes.Rule("theirs", (), rules["find"], rules["rewrite"]))
        try:
            return passes.fingerprint()
        finally:
            remove()

    source = "def find(node): return None\ndef rewrite(node, found): return helper()\ndef helper(): return 1\n"
    assert fingerprint(source) == fingerprint(source) != passes.fingerprint()
    assert fingerprint(source) != fingerprint(source.replace("return 1", "return 2"))


@pytest.mark.slow
def test_a_second_process_hits_and_computes_the_same(caches, tmp_path):
    """Wherever the package lies."""
    directory, first = caches
    second = compile_once(directory, root=copied(tmp_path))
    assert outcome(second) == (1, 0, 0)
    assert second["result"] == first["result"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"drop": True}, {"options": {"cpp.simdlen": 1}}, {"seed": 1}, {"root": "inductor/lowering/pool.py"}],
    ids=["passes", "option", "weights", "a file that writes C++"],
)
def test_what_changes_the_code_or_the_weights_misses(caches, change, tmp_path):
    """Other weights could hit as well, but for lowerings that derive further constants from them."""
    directory, _ = caches
    if file := change.get("root"):
        change = {"root": copied(tmp_path)}
        (tmp_path / "inductor_x86q" / file).write_text((ROOT / "inductor_x86q" / file).read_text() + "# changed\n")
    changed = compile_once(directory, **change)
    assert outcome(changed) == (0, 1, 0)
    assert changed["error"] < 0.01 * changed["size"]


def test_folding_constants_leaves_weights_quantized_and_does_not_compute_their_float_form():
    """A dequantize that cannot be computed, since its weight has another type than it says, shows that none is."""
    import torch
    from torch import fx
    from torch._inductor.freezing import constant_fold

    from inductor_x86q.inductor import fake_tensors, patches

    fake_tensors.register_quantized_decomposed()
    dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
    graph = fx.Graph()
    weight, scales, points = (graph.get_attr(name) for name in ("weight", "scales", "points"))
    doubled = graph.call_function(torch.ops.aten.add.Tensor, (scales, scales))
    graph.output(graph.call_function(dequantize, (weight, doubled, points, 0, 0, 255, torch.uint8)))
    values = {"weight": torch.ones(2, 3, dtype=torch.int8), "scales": torch.ones(2), "points": torch.zeros(2).long()}
    module = fx.GraphModule(values, graph)
    with patches.applied(lambda graph: None):
        constant_fold(module)
    (left,) = (node for node in module.graph.nodes if node.op == "call_function")
    folded = left.args[1]
    assert left.target is dequantize and folded.op == "get_attr"
    assert torch.equal(getattr(module, folded.target), torch.full((2,), 2.0))
    with pytest.raises(AssertionError, match="dtype"):  # stock computes it
        constant_fold(module)
