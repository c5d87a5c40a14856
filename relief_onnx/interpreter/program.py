"""A graph as a flat list of steps over numbered slots, made once and run dumbly.

A slot holds a tensor, a sequence (a list of tensors) or a host value (Python numbers). Slot 0 holds None: inputs that a node leaves out.
What is read for the last time is set free after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["ABSENT", "Program", "Step", "Store"]

ABSENT = 0


@dataclass
class Step:
    """One node: a call from slots to slots. `dead` slots are free afterwards."""

    call: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    label: str
    dead: tuple[int, ...] = ()


@dataclass
class Store:
    """Where weights and constants live: the module's own dictionaries, so that moving the module moves what programs read."""

    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]


@dataclass
class Program:
    """A graph or the body of a control flow node."""

    store: Store
    template: list[Any] = field(default_factory=lambda: [None])
    loads: list[tuple[int, bool, str]] = field(default_factory=list)  # slot, is it a parameter, key
    inputs: list[int] = field(default_factory=list)
    outer: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def slot(self, value: Any = None) -> int:
        """A new slot, holding `value` at the start of every run."""
        self.template.append(value)
        return len(self.template) - 1

    def finish(self) -> None:
        """Find out when each slot is read last."""
        seen = set(self.outputs)
        made = {slot for step in self.steps for slot in step.writes} | {*self.inputs, *self.outer}
        for step in reversed(self.steps):
            last = (made & {*step.reads, *step.writes}) - seen
            step.dead = tuple(sorted(last))
            seen |= last

    def run(self, inputs: Sequence[Any], outer: Sequence[Any] = ()) -> list[Any]:
        """The outputs for these inputs and captured values."""
        values = self.template.copy()
        parameters, buffers = self.store.parameters, self.store.buffers
        for slot, trainable, key in self.loads:
            values[slot] = parameters[key] if trainable else buffers[key]
        for slot, value in zip(self.inputs, inputs, strict=True):
            values[slot] = value
        for slot, value in zip(self.outer, outer, strict=True):
            values[slot] = value
        step = None
        try:
            for step in self.steps:
                result = step.call(*[values[slot] for slot in step.reads])
                if type(result) is tuple:
                    for slot, value in zip(step.writes, result):  # noqa: B905 - a node may leave out its last outputs
                        values[slot] = value
                else:
                    values[step.writes[0]] = result
                for slot in step.dead:
                    values[slot] = None
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if step is not None:
                error.add_note(f"in {step.label}")
            raise
        return [values[slot] for slot in self.outputs]
