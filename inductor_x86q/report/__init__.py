"""What became of every convolution, linear and q/dq node, and why."""

from inductor_x86q.graph.reasons import Obstacle, Reason
from inductor_x86q.report.model import (
    Code,
    Drift,
    Fusion,
    Kernel,
    LayerDrift,
    Miss,
    Moved,
    Node,
    Operation,
    RuleCount,
    Step,
    Tuning,
)
from inductor_x86q.report.report import Report

__all__ = [
    "Code", "Drift", "Fusion", "Kernel", "LayerDrift", "Miss", "Moved", "Node", "Obstacle", "Operation",
    "Reason", "Report", "RuleCount", "Step", "Tuning",
]  # fmt: skip
