"""`python -m inductor_x86q.inductor` prints what of torch is replaced and relied on."""

from inductor_x86q.inductor import supported

print(supported.page())
