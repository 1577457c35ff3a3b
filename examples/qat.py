"""Training for int8 (QAT): the network is trained while it rounds as the int8 network will."""

from shapes import accuracy, images, train, trained

import inductor_x86q

model = trained()
x, _ = images(16)

prepared = inductor_x86q.prepare_qat(model.train(), (x,))  # batch norms are folded into weights that are quantized
train(prepared, steps=20, rate=5e-4)  # the training loop is your own
q = inductor_x86q.convert(prepared)  # `prepared` can be trained further

report = inductor_x86q.explain(q, (x,))
print(report)
print(f"float32 {accuracy(model.eval()):.1%}, trained for int8 {accuracy(q):.1%}")
assert len(report.fused) == 4 and not report.missed
assert accuracy(q) > 0.6
