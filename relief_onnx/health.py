"""A structural look at a model: how deep and how wide it still is, and which outputs no longer depend on any input.

Counts only layers with a weight that is not zero. A layer's width is its number of live units, those with such a weight; depth is the
largest number of layers on a way from an input to an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.branches import DeadBranch
from relief_onnx.constants import Constants, Routes
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, find
from relief_onnx.liveness import find_dead
from relief_onnx.walk import trace

__all__ = ["Health", "Structure", "check_health", "structure"]

# A layer that keeps fewer of its units than this share has probably lost its function.
COLLAPSED = 0.05


@dataclass(frozen=True)
class Structure:
    """`width`: live units per layer, by name. `detached`: outputs that are the same whatever the input is."""

    depth: int
    width: Mapping[str, int]
    detached: tuple[str, ...]

    @property
    def narrowest(self) -> int:
        """The fewest live units of any layer."""
        return min(self.width.values(), default=0)

    @property
    def mean_width(self) -> float:
        """Live units per layer."""
        return float(np.mean(list(self.width.values()))) if self.width else 0.0


def structure(model: onnx.ModelProto) -> Structure:
    """The structure of a (not packed) model."""
    graph = Graph(model)
    plan = find(graph)
    coupling = trace(graph, plan)
    constants = Constants(graph, plan, coupling, Routes(graph, coupling))
    constants.compute()
    live = {layer.key: _live_units(layer, constants.weights) for layer in plan.layers}
    working = {layer.node: False for layer in plan.layers}
    for layer in plan.layers:
        working[layer.node] |= live[layer.key] > 0
    depth = dict.fromkeys((info.name for info in graph.inputs), 0)
    for index, node in enumerate(graph.nodes):
        reached = [depth[name] for name in graph.read_by(index) if name in depth]
        if reached and working.get(index, True):
            depth.update(dict.fromkeys((name for name in node.output if name), max(reached) + (index in working)))
    still = {name for name in graph.outputs if name in constants.values and bool(np.isfinite(constants.values[name]).all())}
    return Structure(
        max((depth.get(name, 0) for name in graph.outputs), default=0),
        {layer.name: live[layer.key] for layer in plan.layers},
        tuple(name for name in graph.outputs if name in still or name not in depth),
    )


@dataclass(frozen=True)
class Health:
    """Before and after, and what to tell the user in plain words. `counting`: units that counted before, of layers where that was asked."""

    before: Structure
    after: Structure
    dead_branches: tuple[DeadBranch, ...]
    counting: Mapping[str, int] = field(default_factory=dict)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Layers that are left with a twentieth of their units or less, or with none."""
        return tuple(
            name
            for name, width in {**self.before.width, **self.counting}.items()
            if width > 1 and self.after.width.get(name, 0) <= max(COLLAPSED * width, 1) and name not in self._gone
        )

    @property
    def _gone(self) -> set[str]:
        return {name for branch in self.dead_branches for name in branch.nodes}

    def warnings(self, advice: str) -> list[str]:
        """One sentence each; `advice` says how more would stay."""
        found = []
        if self.collapsed:
            found.append(f"hardly anything is left of {_some(self.collapsed, 'layer')}; the model has probably lost its function; {advice}")
        detached = [name for name in self.after.detached if name not in self.before.detached]
        if detached:
            verb = "depends" if len(detached) == 1 else "depend"
            found.append(f"{_some(detached, 'output')} no longer {verb} on the input: everything on the way was removed; {advice}")
        found += [f"the branch into {item.join} died and was removed as a block, {len(item.nodes)} nodes" for item in self.dead_branches]
        if self.after.depth < self.before.depth:
            found.append(f"the model is less deep: {self.after.depth} layers on its longest way instead of {self.before.depth}")
        return found

    def document(self) -> dict[str, object]:
        """For the report."""
        return {
            "depth": [self.before.depth, self.after.depth],
            "narrowest_layer": [self.before.narrowest, self.after.narrowest],
            "mean_width": [round(self.before.mean_width, 2), round(self.after.mean_width, 2)],
            "collapsed_layers": list(self.collapsed),
            "detached_outputs": list(self.after.detached),
            "dead_branches": [asdict(branch) | {"nodes": list(branch.nodes)} for branch in self.dead_branches],
        }


def _some(names: Sequence[str], what: str) -> str:
    """The first three names with their kind, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def check_health(before: onnx.ModelProto, after: onnx.ModelProto, dead_branches: tuple[DeadBranch, ...]) -> Health:
    """Compare the structure of the original with that of the pruned model (before packing)."""
    health = Health(structure(before), structure(after), dead_branches)
    return replace(health, counting=_counting(before)) if health.collapsed else health


def _counting(model: onnx.ModelProto) -> dict[str, int]:
    """Of each layer, the units that somebody reads."""
    graph = Graph(model)
    plan = find(graph)
    weights = find_dead(graph, plan, trace(graph, plan)).weights
    return {layer.name: _live_units(layer, weights) for layer in plan.layers}


def _live_units(layer: Layer, weights: Mapping[int, NDArray[Any]]) -> int:
    return int((weights[layer.key] != 0).reshape(layer.out_channels, -1).any(1).sum())
