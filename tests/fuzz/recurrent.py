"""The steps of a random graph that draw recurrent layers, as the quantizer leaves them, and their cells."""

from __future__ import annotations

import torch

from tests.fuzz.draft import Draft

# How many gates each has.
CELLS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class RecurrentSteps(Draft):
    """Each method writes some lines, or none where nothing fits; returns its result's name."""

    def recurrence(self) -> str | None:
        """One layer or two of (steps, rows, width), or of (rows, steps, width)."""
        name = self.rank(3, 3, 4)
        if name is None or 0 in self.values[name].shape:
            return None
        if self.values[name].dim() == 4:  # an image read column by column
            name = self.emit(f"{name}.flatten(2).transpose(1, 2)", name)
        cell, directions, batch_first = self.pick(*CELLS), self.pick(1, 1, 2), self.chance(50)
        for _ in range(self.pick(1, 1, 2)):
            name = self._recurrent_layer(name, cell, directions, batch_first=batch_first)
        return self.quantized(name) if self.chance(40) else name

    def _recurrent_layer(self, name: str, cell: str, directions: int, *, batch_first: bool) -> str:
        hidden = self.pick(1, 3, 4, 8, 16, 17)
        rows = CELLS[cell] * hidden
        gates = self._linear(name, directions * rows)
        limit = self.pick(127, 127, 63, 1)
        scale = float(f"{self.pick(1.0, 1.0, 4.0, 0.01) / (limit * hidden**0.5):.3g}")
        weight = self.constant(f"integers({self.seed()}, {(directions, rows, hidden)}, {-limit}, {limit}, torch.int8)")
        scales = self.constant(f"reals({self.seed()}, {(directions, rows)}, {scale / 8}, {scale})")
        with_bias = cell == "gru" and self.chance(70)
        bias = self.vector((directions, hidden), torch.float32) if with_bias else "None"
        states = ["None", "None"]
        for number in range(1 + (cell == "lstm")):
            if self.chance(30) and not self.dynamic_batch:
                batch = self.values[gates].shape[0 if batch_first else 1]
                states[number] = self.constant(f"reals({self.seed()}, {(directions, batch, hidden)}, -1.5, 1.5)")
        self.note(f"{cell}, {directions} way{'s'[: directions - 1]}", gates)
        arguments = f"{cell!r}, {gates}, {', '.join(states)}, {weight}, {scales}, {bias}, {batch_first}"
        results = self.emit(f"torch.ops.inductor_x86q.recurrence({arguments})", gates, is_float=False)
        self.read.add(results)
        if self.chance(25):
            self.emit(f"{results}[1]", results)
        return self.emit(f"{results}[0]", results)

    def recurrent_cell(self) -> str | None:
        """One step: two linears, and what follows them."""
        name = self.choose(lambda shape: len(shape) == 2 and 0 not in shape)
        if name is None:
            return None
        cell, hidden = self.pick(*CELLS), self.pick(1, 4, 8, 17)
        state = self.choose(lambda shape: shape == (self.values[name].shape[0], hidden)) or self._linear(name, hidden)
        of_input, of_state = (self._linear(operand, CELLS[cell] * hidden) for operand in (name, state))
        self.note(f"{cell} cell", name)
        if cell.startswith("rnn"):
            total = self.emit(f"{of_state} + {of_input}", of_state, of_input)
            return self.emit(f"torch.{cell.removeprefix('rnn_')}({total})", total)
        if cell == "gru":
            x, s = self._gates(of_input, 3), self._gates(of_state, 3)
            reset = self.emit(f"torch.sigmoid({x[0]} + {s[0]}) * {s[2]}", x[0], s[0], s[2])
            candidate = self.emit(f"torch.tanh({x[2]} + {reset})", x[2], reset)
            update = self.emit(f"torch.sigmoid({x[1]} + {s[1]})", x[1], s[1])
            return self.emit(f"{candidate} + {update} * ({state} - {candidate})", candidate, update, state)
        total = self.emit(f"{of_state} + {of_input}", of_state, of_input)
        given, forget, candidate, output = self._gates(total, 4)
        added = self.emit(f"torch.sigmoid({given}) * torch.tanh({candidate})", given, candidate)
        kept = self.emit(f"torch.sigmoid({forget}) * {state} + {added}", forget, state, added)
        return self.emit(f"torch.sigmoid({output}) * torch.tanh({kept})", output, kept)

    def _linear(self, name: str, outputs: int) -> str:
        name, grid = self.activation(name)
        width = self.values[name].shape[-1]
        self.note_small(self.values[name].numel() // width, width, outputs)
        weight = self.weight((outputs, width), grid, self.dtype(name))
        return self.emit(f"F.linear({name}, {weight}, {self.bias(outputs, self.dtype(name))})", name)

    def _gates(self, name: str, count: int) -> list[str]:
        parts = self.emit(f"torch.chunk({name}, {count}, 1)", name, is_float=False)
        self.read.add(parts)
        return [self.emit(f"{parts}[{number}]", parts) for number in range(count)]
