"""Repair without gradients: layer after layer, the weights that are left are solved for again, so that the layer emits what it used to.

Layer by layer in graph order: its inputs are those of the pruned network as repaired so far, its targets are what the original network
emits on the same samples. Where the layer's output goes into a sum with a branch that is there already (a residual block), the target is
what the *sum* should be, so that the layer makes up for what went wrong on the other branch too. Needs no labels, no gradients, no torch.
Both networks run once, piece by piece (see `replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.dataset import Dataset
from relief_onnx.graph import Graph, attributes
from relief_onnx.layers import Layer, Plan, find
from relief_onnx.replay import Replay
from relief_onnx.rows import layer_rows
from relief_onnx.solve import Target, solve
from relief_onnx.surgery import apply_weights

__all__ = ["Repaired", "repair"]

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Samples that repair looks at, how many of them run at a time, and the bytes of rows that one layer holds.
SAMPLES, BATCH, ROW_BYTES = 1024, 32, 256 << 20


@dataclass(frozen=True)
class Repaired:
    """What became of a layer: its error before and after, as parts of the variance of its target, or the reason why it was left."""

    layer: Layer
    before: float = 0.0
    after: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class _Aim:
    """Where a layer's output is judged: in `tensor`, which is scale * output + shift + `other`; before a Relu only where it is positive."""

    tensor: str
    scale: Doubles
    shift: Doubles
    other: str = ""
    one_sided: bool = False


def repair(
    original: Graph, masked: onnx.ModelProto, flags: Mapping[str, Flags], weights: frozenset[str], dataset: Dataset,
    *, removed: Mapping[str, Flags] | None = None, samples: int | None = None, seed: int = 0, threads: int = 0,
    progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> tuple[onnx.ModelProto, tuple[Repaired, ...]]:  # fmt: skip
    """A copy of `masked` with new values of the weights that are left, and a row for each layer of the chosen `weights`.

    original: the model before pruning. masked: the same model with zeros, perhaps with new biases. flags: by initializer, what stays.
    removed: by weight, units [out] that go as a whole. Raises DataError, ModelError.
    """
    graph = Graph(masked)
    plan = find(graph)
    limit = SAMPLES if samples is None else min(samples, SAMPLES)
    feeds = [batch.feed for batch in dataset.batches(BATCH, limit=limit, seed=seed)]
    aims = {layer.name: _aim(original, graph, layer) for layer in plan.layers}
    wanted = {aim.tensor for aim in aims.values()}
    new: dict[str, NDArray[Any]] = {}
    rows = []
    with Replay(original, feeds, wanted, threads=threads) as before, Replay(graph, feeds, (), threads=threads) as after:
        for number, layer in enumerate(plan.layers):
            progress("repair", number, len(plan.layers))
            aim = aims[layer.name]
            reason = _refusal(plan, layer, weights)
            if not reason:
                after.advance(layer.node, new)
                before.advance(original.producer[aim.tensor] + 1)
                job = _Job(graph, layer, aim, flags, (removed or {}).get(layer.weight))
                found, errors = job.run(before, after, seed)
                new |= found
                rows.append(Repaired(layer, *errors) if found else Repaired(layer, reason="its equations have no finite solution"))
            elif layer.weight in weights:
                rows.append(Repaired(layer, reason=reason))
            if not any(other.tensor == aim.tensor for other in list(aims.values())[number + 1 :]):
                before.drop(aim.tensor)
    return (apply_weights(masked, new) if new else masked), tuple(rows)


def _refusal(plan: Plan, layer: Layer, weights: frozenset[str]) -> str:
    """Why a layer keeps its weights as they are; empty where it can be solved for."""
    if layer.weight not in weights:
        return "not chosen"
    if len(plan.by_weight()[layer.weight]) > 1:
        return "several nodes read its weight"
    return ""


def _aim(original: Graph, graph: Graph, layer: Layer) -> _Aim:
    """Follow a layer's output to the sum that it goes into, and to the Relu behind it."""
    aim = _Aim(layer.output, np.ones(layer.out_channels), np.zeros(layer.out_channels))
    if layer.output not in original.producer:
        return _Aim(graph.nodes[layer.node].output[0], aim.scale, aim.shift)
    while len(uses := original.uses.get(aim.tensor, [])) == 1 and uses[0].slot >= 0 and not original.is_output(aim.tensor):
        node = original.nodes[uses[0].node]
        step = _STEPS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        found = step(original, graph, layer, aim, node, uses[0].slot) if step is not None else None
        if found is None:
            break
        aim = found
        if aim.one_sided:
            break
    return aim


def _affine(original: Graph, graph: Graph, layer: Layer, aim: _Aim, node: onnx.NodeProto, slot: int) -> _Aim | None:
    """BatchNormalization as it runs in inference: another scale and shift."""
    values = [original.constant(name) for name in node.input[1:5]]
    if slot or aim.other or len(values) < 4 or layer.output_axis != 1 or attributes(node).get("training_mode", 0):
        return None
    if any(value is None or value.size != layer.out_channels for value in values):
        return None
    gamma, beta, mean, variance = (np.asarray(value, np.float64).reshape(-1) for value in values)
    scale = gamma / np.sqrt(variance + float(attributes(node).get("epsilon", 1e-5)))
    if not scale.all():
        return None
    return _Aim(node.output[0], aim.scale * scale, aim.shift * scale + beta - mean * scale)


def _sum(original: Graph, graph: Graph, layer: Layer, aim: _Aim, node: onnx.NodeProto, slot: int) -> _Aim | None:
    """A sum with another branch, where the pruned network has it before this layer runs."""
    other = node.input[1 - slot]
    is_input = any(info.name == other for info in graph.inputs)
    ready = is_input or graph.producer.get(other, layer.node) < layer.node
    if aim.other or not ready or original.constant(other) is not None or original.shape(other) != original.shape(aim.tensor):
        return None
    if original.shape(other) is None or len(set(node.input)) != 2:
        return None
    return _Aim(node.output[0], aim.scale, aim.shift, other)


def _positive(original: Graph, graph: Graph, layer: Layer, aim: _Aim, node: onnx.NodeProto, slot: int) -> _Aim | None:
    """Only what is above 0 counts."""
    if node.op_type == "Clip":
        least = attributes(node).get("min") if original.opset < 11 else original.constant(node.input[1]) if len(node.input) > 1 else None
        if slot or least is None or float(np.asarray(least).reshape(-1)[0]) != 0:
            return None
    return _Aim(aim.tensor, aim.scale, aim.shift, aim.other, one_sided=True)


# How a layer's output is followed: operator -> step.
_STEPS = {"BatchNormalization": _affine, "Add": _sum, "Relu": _positive, "Clip": _positive}


class _Job:
    """One layer's equations."""

    def __init__(self, graph: Graph, layer: Layer, aim: _Aim, flags: Mapping[str, Flags], removed: Flags | None) -> None:
        self._graph, self._layer, self._aim = graph, layer, aim
        weight = np.asarray(layer.view.apply(graph.array(layer.weight)), np.float64)
        self._weight = weight.reshape(layer.out_channels, -1) * layer.scale
        stays = flags.get(layer.weight)
        keep = np.ones(layer.view.source, bool) if stays is None else np.broadcast_to(stays, layer.view.source)
        self._keep = layer.view.apply(keep).reshape(layer.out_channels, -1)
        self._solved = np.ones(layer.out_channels, bool) if removed is None else ~removed
        self._free = layer.bias is not None and not layer.bias.shared and layer.bias.factor != 0
        self._bias = np.zeros(layer.out_channels)
        if layer.bias is not None:
            self._bias = np.asarray(layer.bias.view.apply(graph.array(layer.bias.name)), np.float64) * layer.bias.factor
            if layer.bias.name in flags:  # what the mask silenced stays silent
                self._solved &= layer.bias.view.apply(np.broadcast_to(flags[layer.bias.name], layer.bias.view.source))

    def run(self, before: Replay, after: Replay, seed: int) -> tuple[dict[str, NDArray[Any]], tuple[float, float]]:
        """New initializers, and the errors before and after."""
        layer = self._layer
        x, wanted, other = self._rows(before, after, seed)
        scale = self._aim.scale
        shift = other + self._aim.shift.astype(np.float32)
        weight, bias = self._weight.copy(), self._bias.copy()
        per_group = layer.out_channels // layer.groups
        errors = np.zeros(2)
        total = float(wanted.var(0, dtype=np.float64)[self._solved].sum()) + 1e-30
        for group in range(layer.groups):
            units = np.arange(group * per_group, (group + 1) * per_group)
            units = units[self._solved[units]]
            if not len(units):
                continue
            own = x[:, group]
            target = Target(wanted[:, units], shift[:, units], scale[units], self._aim.one_sided)
            found = solve(own, target, weight[units], bias[units], self._keep[units], self._free)
            for place, (w, b) in enumerate(((weight[units], bias[units]), found)):
                errors[place] += _error(own, target, w, b)
            weight[units], bias[units] = found
        return self._stored(weight, bias), (float(errors[0]) / total, float(errors[1]) / total)

    def _stored(self, weight: Doubles, bias: Doubles) -> dict[str, NDArray[Any]]:
        layer, graph = self._layer, self._graph
        old = graph.array(layer.weight)
        canonical = np.where(self._keep, weight / layer.scale, 0.0).reshape(layer.view.shape)
        with np.errstate(over="ignore"):  # what is too large for half precision is refused below
            found = {layer.weight: layer.view.invert(canonical).astype(old.dtype)}
        if self._free and layer.bias is not None:
            stored = graph.array(layer.bias.name)
            found[layer.bias.name] = layer.bias.view.invert(bias / layer.bias.factor).astype(stored.dtype)
        return found if all(np.isfinite(value).all() for value in found.values()) else {}

    def _rows(self, before: Replay, after: Replay, seed: int) -> tuple[NDArray[np.float32], ...]:
        """Inputs [rows, groups, features], wanted [rows, out] and what the other branch adds [rows, out], all float32."""
        layer, name = self._layer, self._aim.other
        each = layer.groups * self._weight.shape[1] * 4
        budget = max(ROW_BYTES // each, 64) // max(after.batches, 1)
        collected: list[tuple[NDArray[Any], ...]] = []
        for batch in range(after.batches):
            rng = np.random.default_rng([seed, layer.node, batch])
            x, y = after.value(layer.input, batch), before.value(self._aim.tensor, batch)
            other = after.value(name, batch) if name else None
            assert x is not None
            assert y is not None
            collected.append(layer_rows(layer, x, y, other, budget, rng))
        return tuple(np.concatenate(parts) for parts in zip(*collected, strict=True))


def _error(x: NDArray[np.float32], target: Target, weight: Doubles, bias: Doubles) -> float:
    y = x @ weight.T.astype(np.float32) + bias.astype(np.float32)
    return float((np.square((target.of(y) - y), dtype=np.float64) * np.square(target.scale)).sum() / len(x))
