"""What a layer costs on a CPU, as far as it can be told without timing: which kernel is best, or whether oneDNN's call is."""

from __future__ import annotations

from inductor_x86q import cpu
from inductor_x86q.kernels import isa
from inductor_x86q.kernels.convolution import Convolution
from inductor_x86q.kernels.epilogue import Epilogue
from inductor_x86q.kernels.family import Kernel, candidates

ONEDNN = "onednn"
Choice = Kernel | str


def choose(convolution: Convolution, epilogue: Epilogue) -> list[Choice]:
    """What may compute a layer, the best first; `ONEDNN` stands for the call."""
    found = candidates(convolution, epilogue, isa.best(cpu.usable_flags(), convolution.lanes))
    return [*found, ONEDNN]
