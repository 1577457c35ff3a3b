"""The images stage: a cat or pool of int8 images is an operator of ours, where all sizes are known; factors are stored."""

from inductor_x86q.passes.images import cat, factor, pools

RULES = (*cat.RULES, *pools.RULES, *factor.RULES)
