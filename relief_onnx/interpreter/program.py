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
    """One node: a call from slots to slots.

    `host` are places of inputs that it wants as Python numbers; `dead` slots are free afterwards.
    """

    call: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    label: str
    host: tuple[int, ...] = ()
    wanted: int = 1  # so many of its first outputs are read
    dead: tuple[int, ...] = ()


@dataclass
class Store:
    """Where weights and constants live: the module's own dictionaries, so that moving the module moves what programs read."""

    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]

    def elsewhere(self) -> bool:
        """Whether weights and constants are on another device than the CPU, where whole numbers and shapes stay."""
        first = next(iter(self.parameters.values()), None)
        first = next(iter(self.buffers.values()), None) if first is None else first
        return first is not None and first.device.type != "cpu"


def _together(values: list[Any], host: tuple[int, ...]) -> list[Any]:
    """What a node reads, on one device: tensors on the CPU go where the others are. Single numbers and host inputs may stay."""
    tensors = [place for place, value in enumerate(values) if isinstance(value, torch.Tensor) and place not in host]
    target = next((values[place].device for place in tensors if values[place].device.type != "cpu"), None)
    if target is not None:
        for place in tensors:
            if values[place].dim():
                values[place] = values[place].to(target)
    return values


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
        seen, read = set(self.outputs), set(self.outputs)
        made = {slot for step in self.steps for slot in step.writes} | {*self.inputs, *self.outer}
        for step in reversed(self.steps):
            last = (made & {*step.reads, *step.writes}) - seen
            step.dead = tuple(sorted(last))
            seen |= last
            needed = [place for place, slot in enumerate(step.writes) if slot in read]
            step.wanted = needed[-1] + 1 if needed else 0
            read |= {*step.reads}

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
        step, elsewhere = None, self.store.elsewhere()
        try:
            for step in self.steps:
                arguments = [values[slot] for slot in step.reads]
                result = step.call(*(_together(arguments, step.host) if elsewhere else arguments))
                if type(result) is tuple:
                    if len(result) < step.wanted:
                        raise ValueError(f"output {len(result)} is read, but not computed")
                    for slot, value in zip(step.writes, result):  # noqa: B905 - a node may leave out its last outputs
                        values[slot] = value
                elif step.wanted < 2:
                    values[step.writes[0]] = result
                else:
                    raise ValueError("output 1 is read, but not computed")
                for slot in step.dead:
                    values[slot] = None
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if step is not None:
                error.add_note(f"in {step.label}")
            raise
        return [values[slot] for slot in self.outputs]
