"""Ahead-of-time packages: a quantized model as a .pt2 that Python and C++ load, with its report inside."""

from inductor_x86q.aot.build import package
from inductor_x86q.aot.stored import REPORT_FILE, is_package, load, read_report

__all__ = ["REPORT_FILE", "is_package", "load", "package", "read_report"]
