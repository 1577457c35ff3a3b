"""The normalize stage: one spelling for everything that the later stages look for."""

from inductor_x86q.passes.normalize import channel_factors, row_scales, spelling

RULES = (*spelling.RULES, *channel_factors.RULES, *row_scales.RULES)
