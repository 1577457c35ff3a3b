"""The fuse stage: dequantize → operator → post-operations → quantize becomes one onednn call.

It works from the inside out, a row at a time. `compute` turns a convolution or linear into a call with float output,
`half` a linear of a float16 weight into oneDNN's, `pool` an integer max pool into the library's, `attention` and `recurrent`
attention and the steps of a recurrent layer into operators of ours; `per_token` gives a linear its rows' scales; `post_ops` lets
a call absorb the node behind it: an activation, an addition, a quantize; `own_kernels` lets our operators absorb a quantize;
`output_types` has a call give a type that this CPU has a fast kernel for.
"""

from inductor_x86q.passes.fuse import (
    attention,
    compute,
    half,
    output_types,
    own_kernels,
    per_token,
    pool,
    post_ops,
    recurrent,
)

COMPUTE_RULES = (*compute.RULES, *pool.RULES, *half.RULES, *attention.COMPUTE_RULES, *recurrent.COMPUTE_RULES)
PER_TOKEN_RULES = per_token.RULES
POST_OP_RULES = (*post_ops.RULES, *own_kernels.POST_OP_RULES)
OUTPUT_TYPE_RULES = output_types.RULES
