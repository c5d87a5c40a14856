"""States that a cut made narrower: what the report says, and how the original's values compare with the pruned model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.caches import find_all_states
from relief_onnx.coupling import Coupling
from relief_onnx.graph import Graph, Shape
from relief_onnx.layers import Plan
from relief_onnx.moves import long_axes
from relief_onnx.states import States, masked_states, without_masks
from relief_onnx.surgery import Operation, operate
from relief_onnx.walk import trace

__all__ = ["Signature", "StateChange", "cut_states", "declared", "narrowed", "state_warning"]

Signature = tuple[tuple[str, str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class StateChange:
    """One state input or output ("input", "output"): its shapes, and which entries along `axis` are left."""

    name: str
    kind: str
    axis: int
    before: Shape
    kept: tuple[int, ...]

    @property
    def after(self) -> Shape:
        """The shape of the pruned model's."""
        return (*self.before[: self.axis], len(self.kept), *self.before[self.axis + 1 :])

    def taken(self, array: NDArray[Any]) -> NDArray[Any]:
        """Of the original's values, those that the pruned model has."""
        return np.take(array, self.kept, self.axis)

    def document(self) -> dict[str, Any]:
        """As it stands in the report."""
        return {
            "name": self.name, "kind": self.kind, "before": list(self.before), "after": list(self.after), "axis": self.axis,
            "kept": list(self.kept),
        }  # fmt: skip


def cut_states(
    model: onnx.ModelProto, masked: onnx.ModelProto, graph: Graph, plan: Plan, coupling: Coupling | None, units: bool = True
) -> tuple[Operation, onnx.ModelProto, tuple[StateChange, ...]]:
    """Surgery on `model`, in which states may get narrower where a coupling of `graph` is given; the masked model, and what changed.

    model: with zeros where something goes; masked: the same as a file, which gets the masks of states. units: as for `operate`.
    """
    if coupling is None:
        return operate(model, units=units), masked, ()
    states, arrays = find_all_states(graph, plan), Graph(model)
    if coupling.ways:  # what surgery takes from each direction may be other pairs than those that were ranked
        coupling = trace(graph, plan, states)
    operation = operate(masked_states(model, arrays, coupling, states), states, units=units)
    operation = replace(operation, model=without_masks(operation.model, states))
    return operation, masked_states(masked, arrays, coupling, states), _changes(graph, plan, coupling, states, operation)


def _changes(graph: Graph, plan: Plan, coupling: Coupling, states: States, operation: Operation) -> tuple[StateChange, ...]:
    """What surgery took from the states of a model with that graph, plan and coupling."""
    left: set[int] = set()
    for layer in plan.layers:
        if layer.weight in operation.kept:
            left |= set(coupling.outputs[layer.key][operation.kept[layer.weight][0]].tolist())
    found = []
    for kind, names in (("input", states.inputs), ("output", [name for name in graph.outputs if name in states.outputs])):
        for name in names:
            axes = long_axes(coupling.pictures[name])
            shape = graph.shape(name)
            if len(axes) != 1 or shape is None:
                continue
            line = coupling.line(name, axes[0])
            kept = np.isin(line, list(left))
            if not kept.all():
                before = (*shape[: axes[0]], len(line), *shape[axes[0] + 1 :])
                found.append(StateChange(name, kind, axes[0], before, tuple(np.flatnonzero(kept).tolist())))
    return tuple(found)


def declared(signature: Signature, changes: Sequence[StateChange]) -> Signature:
    """The signature that a model has after those changes."""
    by_name = {change.name: change for change in changes}
    return tuple((name, kind, _cut(shape, by_name.get(name))) for name, kind, shape in signature)


def _cut(shape: tuple[Any, ...], change: StateChange | None) -> tuple[Any, ...]:
    if change is None or change.axis >= len(shape) or not isinstance(shape[change.axis], int):
        return shape
    return (*shape[: change.axis], len(change.kept), *shape[change.axis + 1 :])


def narrowed(feed: Mapping[str, NDArray[Any]], changes: Sequence[StateChange]) -> dict[str, NDArray[Any]]:
    """A feed of the original as the pruned model takes it."""
    taken = {change.name: change.taken(feed[change.name]) for change in changes if change.kind == "input" and change.name in feed}
    return {**feed, **taken}


def state_warning(changes: Sequence[StateChange]) -> list[str]:
    """The sentence of the report; none where nothing changed."""
    if not changes:
        return []
    parts = ", ".join(f"{change.kind} {change.name} from {list(change.before)} to {list(change.after)}" for change in changes)
    return [f"states got narrower, as allow-state-change allows: {parts}; state_changes in the report has the units that are left"]
