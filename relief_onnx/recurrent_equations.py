"""The weights of a recurrent node as equations: each gate row should sum up to what it does in the original.

W and R of a row are solved together: the inputs are the pruned network's own x and h of the step before (from its own run, so far), the
target is the sum of the original, W x + R h + b, on the original's. As the states change with the weights, the node runs again with the
new ones and they are solved for once more (PASSES). Of a GRU with linear_before_reset 1 the candidate rows of W and R are two sums, with
the reset gate between them: each is solved by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.equations import Equations
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer
from relief_onnx.recurrent_layers import is_bias
from relief_onnx.recurrent_reads import Cell, cell_of, read_by_r, steps_of, stored
from relief_onnx.ridge import few_rows
from relief_onnx.rows import ENOUGH_ROWS, POSITIONS
from relief_onnx.session import Session
from relief_onnx.solve import SOLVE_FLOPS, Target, solve
from relief_onnx.worth import Appraisal

__all__ = ["Loop", "NoEquations", "PartEquations", "Values", "inputs_of", "start_of"]

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

# How often a node is solved for; bytes of rows that it holds.
PASSES, ROW_BYTES = 2, 256 << 20
# R^EXPONENT is what a unit is worth (see `obs`).
EXPONENT = 0.75


def inputs_of(graph: Graph, index: int) -> list[str]:
    """What a node reads that is computed when the model runs: x, lengths, first states."""
    node = graph.nodes[index]
    slots = [slot for slot in (0, 4, 5, 6) if slot < len(node.input) and node.input[slot]]
    return [node.input[slot] for slot in slots if graph.constant(node.input[slot]) is None]


def start_of(graph: Graph, index: int) -> int:
    """Where the node begins: the halves of its bias are put together right before it."""
    return index - 1 if index > 0 and is_bias(graph, graph.nodes[index - 1]) else index


@dataclass(frozen=True)
class _Weights:
    """W and R [directions, gates * hidden, n] and the two halves of the bias [directions, gates * hidden]."""

    w: Doubles
    r: Doubles
    biases: tuple[Doubles, Doubles]

    def part(self, name: str) -> Doubles:
        return self.w if name == "W" else self.r

    def bias(self, name: str) -> Doubles:
        return self.biases[0 if name == "W" else 1]


@dataclass(frozen=True)
class _Rows:
    """What W and R read at some steps [rows, n], with one n for each group of R."""

    x: Floats
    h: Floats


@dataclass(frozen=True)
class _Block:
    """Gate rows of one direction that share their inputs: `rows` within the direction, the parts whose sum is met, and R's group."""

    direction: int
    rows: NDArray[np.intp]
    parts: str
    group: int


def _blocks(cell: Cell, gates: int, hidden: int) -> Iterator[_Block]:
    every = np.arange(gates * hidden)
    for direction in range(len(cell.backward)):
        if cell.op != "GRU":
            yield _Block(direction, every, "WR", direction)
        elif cell.linear_before_reset:
            yield _Block(direction, every[: 2 * hidden], "WR", direction)
            yield _Block(direction, every[2 * hidden :], "W", direction)
            yield _Block(direction, every[2 * hidden :], "R", direction)
        else:
            yield _Block(direction, every[: 2 * hidden], "WR", 3 * direction)
            yield _Block(direction, every[2 * hidden :], "WR", 3 * direction + 2)


class Values(Protocol):
    """A network on all batches: what a node reads."""

    @property
    def batches(self) -> int:
        """How many there are."""

    def value(self, name: str, batch: int) -> NDArray[Any] | None:
        """A tensor of one batch."""


class _Runs:
    """One node on all batches, with whatever weights: a model of that node alone."""

    def __init__(self, graph: Graph, index: int, replay: Values, threads: int) -> None:
        node = onnx.NodeProto.FromString(graph.nodes[index].SerializeToString())
        inputs = [*node.input, *[""] * (4 - len(node.input))]
        inputs[3] = inputs[3] or "bias"
        given = {1: "w", 2: "r", 3: "b"}
        self._names = {slot: f"in{slot}" for slot, name in enumerate(inputs) if name}
        del node.input[:], node.output[:]
        node.input.extend(self._names.get(slot, "") for slot in range(len(inputs)))
        node.output.append("y")
        self.cell = cell_of(node)
        self.feeds: list[dict[str, NDArray[Any]]] = []
        for batch in range(replay.batches):
            feed = {}
            for slot, name in enumerate(inputs):
                if name and slot not in given:
                    value = graph.constant(name)
                    value = replay.value(name, batch) if value is None else value
                    assert value is not None
                    feed[self._names[slot]] = value
            self.feeds.append(feed)
        first = self.feeds[0]
        types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in first.items()}
        self._dtype = first["in0"].dtype
        types |= dict.fromkeys((self._names[slot] for slot in given), types["in0"])
        ends = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
        body = helper.make_graph([node], "one", ends, [helper.make_tensor_value_info("y", types["in0"], None)])
        model = helper.make_model(body, opset_imports=graph.model.opset_import)
        model.ir_version = max(graph.model.ir_version, 4)
        self._session = Session(model, threads, f"node {graph.names[index]}")

    def rows(self, weights: _Weights, picked: list[NDArray[np.intp]]) -> _Rows:
        """What the weights read on all batches; of each batch the picked ones of the steps that count."""
        given = {1: weights.w, 2: weights.r, 3: np.concatenate(weights.biases, axis=1)}
        more = {self._names[slot]: value.astype(self._dtype) for slot, value in given.items()}
        xs: list[Floats] = []
        hs: list[Floats] = []
        for feed, chosen in zip(self.feeds, picked, strict=True):
            (y,) = self._session.run({**feed, **more}, ["y"], "the calibration data")
            steps = steps_of(self.cell, feed["in0"], y, feed.get("in5"), feed.get("in4"))
            h = read_by_r(self.cell, steps, weights.w, weights.r, weights.biases)
            for found, value in ((xs, steps.x), (hs, h)):
                rows = steps.rows(value)
                found.append(np.asarray(rows.reshape(-1, rows.shape[2])[chosen], np.float32))
        return _Rows(np.concatenate(xs), np.concatenate(hs))

    def counts(self) -> list[tuple[int, int]]:
        """Of each batch how many steps count, and how many entries it has."""
        found = []
        for feed in self.feeds:
            x = feed["in0"] if self.cell.batch_first else feed["in0"].swapaxes(0, 1)
            lengths = feed.get("in4")
            steps = x.shape[0] * x.shape[1] if lengths is None else int(np.minimum(np.asarray(lengths), x.shape[1]).sum())
            found.append((steps, x.shape[0]))
        return found


class Loop:
    """A recurrent node in both networks. `free`: the weights that may change; flags and removed as for `equations.Equations`."""

    def __init__(
        self, original: Graph, graph: Graph, layers: Mapping[str, Layer], free: Collection[str], flags: Mapping[str, Flags],
        removed: Mapping[str, Flags], before: Values, after: Values, seed: int, threads: int,
    ) -> None:  # fmt: skip
        self._graph, self._layers = graph, layers
        kind, index = layers["W"].recurrent, layers["W"].node
        assert kind is not None
        self._kind, self._sizes = kind, (kind.directions, kind.gates * kind.hidden)
        self._free = "".join(part for part in "WR" if layers[part].weight in free)
        self._biased = {part: _has_own_bias(layers[part]) for part in "WR"}
        self._keep = {part: self._flags(layers[part], flags) for part in "WR"}
        self._solved = np.ones(self._sizes, bool)
        bias_keep = {}
        for part, layer in layers.items():
            if layer.weight in removed:
                self._solved &= ~removed[layer.weight].reshape(self._sizes)
            own = flags.get(layer.bias.name) if layer.bias is not None else None
            bias_keep[part] = np.ones(self._sizes, bool) if own is None else np.broadcast_to(own, self._sizes)
            self._solved &= bias_keep[part]  # what the mask silenced stays silent
        w, r, biases = stored(graph, index)
        self._given = _doubles(w, r, biases)
        self._masked = _Weights(
            self._given.w * self._keep["W"], self._given.r * self._keep["R"],
            (self._given.biases[0] * bias_keep["W"], self._given.biases[1] * bias_keep["R"]),
        )  # fmt: skip
        place = original.producer[layers["W"].output]
        self._original = _doubles(*stored(original, place))
        old, self._now = _Runs(original, place, before, threads), _Runs(graph, index, after, threads)
        self._cell = old.cell
        width = self._given.w.shape[2] + self._given.r.shape[2] * layers["R"].groups + self._sizes[0] * self._sizes[1]
        batches = max(after.batches, 1)
        budget = max(ROW_BYTES // (4 * width), 64) // batches
        enough = math.ceil(ENOUGH_ROWS * float(self._kept_inputs().sum(1).mean()) / batches)
        self._picked = []
        for batch, (steps, entries) in enumerate(old.counts()):
            number = min(steps, max(budget, 1), max(POSITIONS * entries, enough))
            self._picked.append(np.sort(np.random.default_rng([seed, index, batch]).permutation(steps)[:number]))
        self._wanted = old.rows(self._original, self._picked)
        self._done: dict[tuple[Any, ...], Any] = {}

    def _flags(self, layer: Layer, flags: Mapping[str, Flags]) -> Flags:
        if layer.weight not in flags:
            return np.ones((*self._sizes, layer.in_per_group), bool)
        keep: Flags = layer.view.apply(np.broadcast_to(flags[layer.weight], layer.view.source)).reshape(*self._sizes, -1)
        return keep

    def _kept_inputs(self) -> Flags:
        """Of each gate row, those of W and of R [rows, inputs]."""
        return np.concatenate([own.reshape(-1, own.shape[-1]) for own in self._keep.values()], axis=1)

    def part(self, layer: Layer) -> PartEquations:
        """The equations of W or R."""
        assert layer.recurrent is not None
        return PartEquations(self, layer, layer.recurrent.part)

    # -- one pass ---------------------------------------------------------------------------------------------------------

    def _sums(self, weights: _Weights, rows: _Rows, block: _Block, parts: str) -> Floats:
        """What some parts of a block's rows sum up to, with their biases [rows, units]."""
        total: Any = 0.0
        for part in parts:
            at = (block.direction, block.rows)
            weight, bias = weights.part(part)[at].astype(np.float32), weights.bias(part)[at].astype(np.float32)
            total = total + _read(rows, block, part, self._kind.hidden) @ weight.T + bias
        return np.asarray(total, np.float32)

    def _pass(
        self, rows: _Rows, current: _Weights, appraise: dict[str, Appraisal] | None, validated: bool = False
    ) -> tuple[_Weights, Doubles]:
        """New weights from those rows; of each row the squared errors of masked and new weights, and the target's variance [3, rows]."""
        new = _Weights(current.w.copy(), current.r.copy(), (current.biases[0].copy(), current.biases[1].copy()))
        errors = np.zeros((3, *self._sizes))
        for block in _blocks(self._cell, self._kind.gates, self._kind.hidden):
            block = _Block(block.direction, block.rows[self._solved[block.direction, block.rows]], block.parts, block.group)
            parts = "".join(part for part in block.parts if part in self._free)
            if not len(block.rows):
                continue
            wanted = self._sums(self._original, self._wanted, block, block.parts)
            fixed = "".join(part for part in block.parts if part not in parts)
            wanted = wanted - self._sums(current, rows, block, fixed) if fixed else wanted
            before = self._sums(self._masked, rows, block, parts) if parts else np.zeros_like(wanted)
            at = (block.direction, block.rows)
            errors[0][at] += np.square(before - wanted, dtype=np.float64).mean(0)
            errors[2][at] += wanted.var(0, dtype=np.float64)
            if parts:
                self._solve(rows, wanted, block, parts, new, appraise, validated)
                wanted = wanted - self._sums(new, rows, block, parts)
                errors[1][at] += np.square(wanted, dtype=np.float64).mean(0)
        return new, errors.reshape(3, -1)

    def _solve(
        self, rows: _Rows, wanted: Floats, block: _Block, parts: str, new: _Weights, appraise: dict[str, Appraisal] | None, validated: bool
    ) -> None:
        """Write new weights of a block's rows into `new`; the ridge sees each part in units of its own activity."""
        at = (block.direction, block.rows)
        reads = [_read(rows, block, part, self._kind.hidden) for part in parts]
        scales = [float(np.sqrt(np.square(x - x.mean(0), dtype=np.float64).mean())) or 1.0 for x in reads]
        x = np.concatenate([x / np.float32(scale) for x, scale in zip(reads, scales, strict=True)], axis=1)
        given = self._given if appraise is not None else self._masked
        weight = np.concatenate([given.part(part)[at] * scale for part, scale in zip(parts, scales, strict=True)], axis=1)
        keep = np.concatenate([self._keep[part][at] for part in parts], axis=1)
        free = next((part for part in parts if self._biased[part]), "")
        bias = np.sum([self._masked.bias(part)[at] for part in parts], axis=0)
        target = Target(wanted, np.zeros_like(wanted), np.ones(wanted.shape[1]), one_sided=False)
        judged = None
        if appraise is not None:
            first = next(iter(appraise.values())).part(len(keep))
            judged = Appraisal.empty(keep.shape, 1, first.additions, first.flops * len(parts))
        found, offset = solve(x, target, weight, bias, keep, bool(free), judged, validated=validated)
        ends = np.cumsum([0, *(part.shape[1] for part in reads)])
        for place, (part, scale) in enumerate(zip(parts, scales, strict=True)):
            own = slice(ends[place], ends[place + 1])
            new.part(part)[at] = found[:, own] / scale
            if appraise is not None and judged is not None:
                worth = appraise[part].worth.reshape(*self._sizes, -1)
                worth[at] = judged.worth[:, own] / len(x)
        if free:
            new.bias(free)[at] = offset - sum(self._masked.bias(part)[at] for part in parts if part != free)

    # -- what is asked ----------------------------------------------------------------------------------------------------

    def few(self, times: float) -> bool:
        """Whether so many times the rows are so few that a larger ridge may do better on others."""
        return few_rows(int(times * len(self._wanted.x)), self._kept_inputs())

    def solved(self, validated: bool = False) -> tuple[_Weights, Doubles]:
        """New weights, and of each row the errors before and after and the variance of the targets [3, rows]."""
        key = ("solved", validated)
        if key not in self._done:
            weights, errors = self._masked, np.zeros((3, 0))
            for number in range(PASSES):
                weights, found = self._pass(self._now.rows(weights, self._picked), weights, None, validated)
                errors = found if number == 0 else np.stack([errors[0], found[1], found[2]])
            self._done[key] = weights, errors
        result: tuple[_Weights, Doubles] = self._done[key]
        return result

    def appraised(self, additions: bool, flops: float = math.inf) -> tuple[_Weights, dict[str, Appraisal]]:
        """New weights, and what each weight of W and R is worth. flops: about what that may take for each of them."""
        key = ("appraised", additions)
        if key not in self._done:
            shapes = {part: (self._sizes[0] * self._sizes[1], self._keep[part].shape[2]) for part in "WR"}
            found = {part: Appraisal.empty(shape, 1, additions, flops) for part, shape in shapes.items()}
            self._done[key] = self._pass(self._now.rows(self._masked, self._picked), self._masked, found)[0], found
        result: tuple[_Weights, dict[str, Appraisal]] = self._done[key]
        return result

    def variance(self, part: str) -> Doubles:
        """What the error of a row is a part of [out].

        R that `relevance` gives to W or R of a row is a part of the row's; so is what it is divided by, to the same power.
        """
        found = np.zeros(self._sizes)
        rows = self._now.rows(self._given, self._picked)
        for block in _blocks(self._cell, self._kind.gates, self._kind.hidden):
            if part in block.parts:
                own, every = (self._sums(self._given, rows, block, parts).var(0, dtype=np.float64) for parts in (part, block.parts))
                others = sum(self._sums(self._given, rows, block, one).var(0, dtype=np.float64) for one in block.parts)
                found[block.direction, block.rows] = every * (own / np.where(others > 0, others, 1.0)) ** EXPONENT
        return found.reshape(-1)

    def initializers(self, weights: _Weights, part: str) -> dict[str, NDArray[Any]]:
        """New values of W or R and of its half of the bias; empty where they are not finite."""
        layer, graph = self._layers[part], self._graph
        canonical = (weights.part(part) * self._keep[part]).reshape(layer.view.shape)
        found = {layer.weight: layer.view.invert(canonical).astype(graph.array(layer.weight).dtype)}
        if self._biased[part] and layer.bias is not None:
            found[layer.bias.name] = weights.bias(part).astype(graph.array(layer.bias.name).dtype)
        return found if all(np.isfinite(value).all() for value in found.values()) else {}


class PartEquations(Equations):
    """W or R of a node, as `equations.Equations` has it for other layers."""

    def __init__(self, loop: Loop, layer: Layer, part: str) -> None:
        self._loop, self._layer, self._part = loop, layer, part

    def variance(self) -> Doubles:
        """See `Loop.variance`."""
        return self._loop.variance(self._part)

    def few(self, times: float = 1.0) -> bool:
        """See `Equations.few`."""
        return self._loop.few(times)

    def solved(self, flops: float = SOLVE_FLOPS, validated: bool = False) -> tuple[dict[str, NDArray[Any]], tuple[float, float]]:
        """New initializers, and the errors of the node's rows before and after."""
        weights, errors = self._loop.solved(validated)
        before, after, total = errors.sum(1)
        return self._loop.initializers(weights, self._part), (float(before / (total + 1e-30)), float(after / (total + 1e-30)))

    def trial(self, flops: float) -> tuple[dict[str, NDArray[Any]], Doubles]:
        """New initializers, and the mean squared error of the node's rows, which W and R share [out]."""
        weights, errors = self._loop.solved()
        return self._loop.initializers(weights, self._part), errors[1]

    def appraised(self, size: int, additions: bool, flops: float = math.inf) -> tuple[dict[str, NDArray[Any]], Appraisal]:
        """New initializers and what each weight is worth."""
        weights, found = self._loop.appraised(additions, flops)
        return self._loop.initializers(weights, self._part), found[self._part]


class NoEquations(Equations):
    """Of a node within a body that no batch takes to in both networks."""

    met = False

    def __init__(self) -> None: ...

    def few(self, times: float = 1.0) -> bool:
        """See `Equations.few`."""
        return False

    def solved(self, flops: float = SOLVE_FLOPS, validated: bool = False) -> tuple[dict[str, NDArray[Any]], tuple[float, float]]:
        """Nothing."""
        return {}, (0.0, 0.0)


def _doubles(w: NDArray[Any], r: NDArray[Any], biases: tuple[NDArray[Any], NDArray[Any]]) -> _Weights:
    return _Weights(w.astype(np.float64), r.astype(np.float64), (biases[0].astype(np.float64), biases[1].astype(np.float64)))


def _has_own_bias(layer: Layer) -> bool:
    return layer.bias is not None and not layer.bias.shared


def _read(rows: _Rows, block: _Block, part: str, hidden: int) -> Floats:
    return rows.x if part == "W" else rows.h[:, block.group * hidden : (block.group + 1) * hidden]
